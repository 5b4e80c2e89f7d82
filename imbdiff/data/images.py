"""The one form in which labelled images travel through the project."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from imbdiff.errors import InputError


@dataclass(frozen=True)
class ImageSet:
    """Labelled images in memory: images uint8 [N, C, H, W], labels int64 [N] in 0 .. len(class_names) - 1."""

    images: Tensor
    labels: Tensor
    class_names: tuple[str, ...]
    name: str

    def __post_init__(self) -> None:
        if self.images.ndim != 4 or self.images.dtype != torch.uint8:
            raise InputError(
                f"{self.name}: images must be uint8 [N, C, H, W], got {self.images.dtype} {tuple(self.images.shape)}"
            )
        if self.labels.shape != self.images.shape[:1] or self.labels.dtype != torch.int64:
            raise InputError(
                f"{self.name}: labels must be int64 [{len(self.images)}], one for each image, "
                f"got {self.labels.dtype} {tuple(self.labels.shape)}"
            )
        low, high = (int(self.labels.min()), int(self.labels.max())) if len(self) else (0, 0)
        if low < 0 or high >= len(self.class_names):
            raise InputError(
                f"{self.name}: labels must lie in 0..{len(self.class_names) - 1} "
                f"({len(self.class_names)} classes), got {low}..{high}"
            )

    def __len__(self) -> int:
        return len(self.images)

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of each image."""
        channels, height, width = self.images.shape[1:]
        return channels, height, width

    @property
    def counts(self) -> Tensor:
        """Images of each class, int64 [C]."""
        return torch.bincount(self.labels, minlength=self.num_classes)

    def take(self, index: Tensor) -> ImageSet:
        return ImageSet(self.images[index], self.labels[index], self.class_names, self.name)

    def to(self, device: torch.device) -> ImageSet:
        return ImageSet(self.images.to(device), self.labels.to(device), self.class_names, self.name)


def to_unit(images: Tensor) -> Tensor:
    """uint8 0..255 to float32 in [-1, 1]."""
    return images.float() / 127.5 - 1


def to_uint8(x: Tensor) -> Tensor:
    """Float images in [-1, 1] to uint8, rounded to the nearest value and clipped."""
    return ((x.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
