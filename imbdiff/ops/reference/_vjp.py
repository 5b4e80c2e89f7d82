"""The derivative of plain torch, for the references' backwards."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def vjp(of: Callable[..., Any], *rows: Tensor) -> tuple[Any, Callable[[Any], tuple[Tensor, ...]]]:
    """(value of the function, its pullback), as of `torch.func.vjp`.

    In plain autograd: functorch's transforms do not run inside a dispatch mode, and counters of operations, `opcheck`
    and the first run of a compiled graph are such modes. There autograd is off as in inference mode.
    """
    with torch.inference_mode(False), torch.enable_grad():
        leaves = [x.detach().requires_grad_() for x in rows]
        value = of(*leaves)

    def pullback(grad: Any) -> tuple[Tensor, ...]:
        outputs, grads = (x if isinstance(x, tuple) else (x,) for x in (value, grad))
        used = [(o, g) for o, g in zip(outputs, grads, strict=True) if o.requires_grad]
        with torch.inference_mode(False):
            return torch.autograd.grad([o for o, _ in used], leaves, [g for _, g in used], materialize_grads=True)

    return value, pullback
