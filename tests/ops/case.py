"""What a case of `test_every_op.py` is."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Case:
    """One call of an operation: the low-level arguments, and which of them are rows with gradient."""

    op: str
    label: str
    make: Callable[[torch.dtype], tuple[Any, ...]]
    leaves: Callable[[tuple[Any, ...]], tuple[tuple[Any, ...], list[Tensor]]]
    """The arguments with fresh leaves in place of the differentiable rows, layout kept; and those leaves."""
    outputs: int
    """How many leading outputs are differentiable."""
    condition: Callable[[tuple[Any, ...]], float]
    """Relative size of what cancels on the way to the result: it loses eps times this."""
    cancels: Callable[[tuple[Any, ...], list[Tensor]], float] = lambda args, grads: 1.0
    """Size of what the gradients are sums of, relative to them, where those of the outputs' gradients may cancel."""
    rounds_rows: bool = False
    """Whether centred rows are rounded to their own type before they are multiplied, as torch's own product does."""
