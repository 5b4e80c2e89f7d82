"""What networks take and give: an opaque condition in, a prediction with tapped features out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor


class Cond(Protocol):
    """A batch of conditions: labels or text. Methods rearrange it by these operations and never look inside."""

    def take(self, index: Tensor) -> Any:
        """The rows `index` (int64)."""

    def where(self, keep: Tensor, other: Any) -> Any:
        """Row by row: the own one where `keep` [B] is true, else that of `other`."""

    def cat(self, others: Sequence[Any]) -> Any:
        """The own rows, then those of each of `others`."""

    def sample(self, prob: Tensor, u: Tensor) -> Any:
        """Conditions drawn by the probability of their group: prob [C], u [B] uniform."""

    def __len__(self) -> int: ...


@dataclass(frozen=True, eq=False)
class LabelCond:
    """Class labels, ids int64 [B] in 0 .. num_classes, where num_classes is the null label."""

    ids: Tensor

    def __post_init__(self) -> None:
        if self.ids.ndim != 1 or self.ids.dtype != torch.int64:
            raise ValueError(f"label ids must be int64 [B], got {self.ids.dtype} {list(self.ids.shape)}")

    def __len__(self) -> int:
        return len(self.ids)

    def take(self, index: Tensor) -> LabelCond:
        return LabelCond(self.ids[index])

    def where(self, keep: Tensor, other: LabelCond) -> LabelCond:
        if keep.dtype != torch.bool or keep.shape != self.ids.shape or other.ids.shape != self.ids.shape:
            raise ValueError(
                f"where takes bool [{len(self)}] and {len(self)} other labels, "
                f"got {keep.dtype} {list(keep.shape)} and {len(other)}"
            )
        return LabelCond(torch.where(keep, self.ids, other.ids))

    def cat(self, others: Sequence[LabelCond]) -> LabelCond:
        return LabelCond(torch.cat([self.ids, *(other.ids for other in others)]))

    @staticmethod
    def sample(prob: Tensor, u: Tensor) -> LabelCond:
        """Labels drawn by class probability: id = the first class whose cumulated probability exceeds u.

        prob [C] non-negative weights, normalised here; u [B] uniform on [0, 1). A class of weight 0 is never drawn.
        No global random state: the same u gives the same labels.
        """
        if prob.ndim != 1 or u.ndim != 1:
            raise ValueError(f"sample takes prob [C] and u [B], got {list(prob.shape)} and {list(u.shape)}")
        prob = prob.double()
        free = prob.device.type == "cpu" and not torch.compiler.is_compiling()
        if free and not (bool((prob >= 0).all()) and 0 < float(prob.sum()) < float("inf")):
            raise ValueError(f"class weights must be finite, non-negative and not all 0, got {prob.tolist()}")
        # A parallel sum may round the edges of an empty class apart. So an empty class takes over the edge before it,
        # and with the division by the last edge the topmost non-empty class ends at exactly 1.
        edge = torch.where(prob > 0, prob.cumsum(0), -1.0).cummax(0).values
        return LabelCond(torch.searchsorted(edge / edge[-1], u.double(), right=True))


@dataclass(frozen=True, eq=False)
class Out:
    """What a network returns: the native prediction [B, C, H, W], the features asked for, the learned variance."""

    pred: Tensor
    feats: Mapping[str, Tensor]
    variance: Tensor | None = None
