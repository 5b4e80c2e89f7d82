"""What a method may say: branches, terms, another clean target, a weight on the base loss.

Every remedy for class imbalance evaluates the network at the same (x_t, t) under another condition, or without its
extra capacity, and compares. The trainer owns the base loss and counts it once; methods only add to it:

- a `Branch` asks for one more evaluation of the network;
- a `Pair` compares the own prediction with a branch, element by element; base and all pairs are one fused call;
- a `Scalar` is any other loss, one that is not a mean over samples;
- `x0_target` names another clean image to regress to (at most one method may);
- `base_weight` reweights the base loss per sample (several multiply).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor, nn

from imbdiff import random
from imbdiff.models.types import Cond, Out


@dataclass(frozen=True)
class Batch:
    """Noised training images. Every field is a function of (seed, global sample number)."""

    x0: Tensor
    """[B, C, H, W] clean images in [-1, 1]."""
    eps: Tensor
    """Like x0: the noise."""
    x_t: Tensor
    """Like x0: signal x0 + sigma eps."""
    t: Tensor
    """[B] what the network is fed."""
    signal: Tensor
    """[B] factor of x0."""
    sigma: Tensor
    """[B] factor of eps."""
    noise: Tensor
    """[B] noise level, 0 clean to 1 pure noise: every published w(t) is a function of it, whatever the path."""
    cond: Cond
    """The true condition, before dropping."""
    null: Cond
    """The null condition, a row for each sample."""
    dropped: Tensor
    """[B] bool: where the own condition is replaced by null. A mask in the weights, never a skipped forward."""
    group: Tensor
    """[B] int64, what `counts` is indexed by: the class. Not the condition, which may be text."""
    counts: Tensor
    """[C] training images of each group."""
    seed: int
    key: Tensor
    """[B] int64 global sample numbers."""
    extra: Mapping[str, Any] = field(default_factory=dict)
    """What a data module adds: neighbours' conditions, a reference bank."""

    def uniform(self, stream: str, shape: tuple[int, ...] = ()) -> Tensor:
        """[B, *shape] uniform draws of the named stream; name it after the method, so that no two methods share one."""
        return random.uniform(self.seed, stream, self.key, shape)

    def normal(self, stream: str, shape: tuple[int, ...] = ()) -> Tensor:
        return random.normal(self.seed, stream, self.key, shape)


@dataclass(frozen=True)
class Branch:
    """The same (x_t, t) once more, otherwise."""

    cond: Cond | None = None
    """None: the own condition after dropping."""
    expert: bool = True
    """False: without the network's extra low-rank capacity."""
    grad: bool = True
    taps: tuple[str, ...] = ()
    """Features wanted from this branch."""
    share: str | None = None
    """Branches of several methods with the same key are one: "null", "general". Random conditions never share."""


@dataclass(frozen=True)
class Pair:
    """w_i d(own_i, other_i), or w_i max(0, margin - d), see `imbdiff.ops.two_branch_loss`."""

    name: str
    other: str
    weight: Tensor
    """[B], masked by the method; in the native prediction space of the path."""
    g_own: float = 1.0
    g_other: float = 1.0
    value: float = 1.0
    margin: float | None = None


@dataclass(frozen=True)
class Scalar:
    name: str
    value: Tensor


@dataclass(frozen=True)
class MethodConfig:
    """Settings that every method has."""

    weight: float = 1.0
    """Factor of all of the method's terms; 0 switches it off."""


class Method(nn.Module):
    """A Module, because some methods bring parameters: they are optimised, averaged and saved with the network."""

    requires: ClassVar[frozenset[str]] = frozenset()
    """What the network or the data must provide ("expert", "tap:mid", "neighbours"), checked before the first step."""
    own_taps: tuple[str, ...] = ()
    """Features wanted from the own branch."""

    def __init__(self, config: MethodConfig | None = None) -> None:
        super().__init__()
        self.config = config or MethodConfig()

    @property
    def weight(self) -> float:
        return self.config.weight

    def branches(self, batch: Batch) -> Mapping[str, Branch]:
        return {}

    def x0_target(self, batch: Batch) -> Tensor | None:
        return None

    def base_weight(self, batch: Batch) -> Tensor | None:
        return None

    def terms(self, batch: Batch, own: Out, out: Mapping[str, Out]) -> Sequence[Pair | Scalar]:
        return ()
