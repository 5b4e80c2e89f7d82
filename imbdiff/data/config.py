"""What data a run trains on: one frozen record, shown by the command line as the flags --data.*"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Source = Literal["digits", "npz", "folder", "cifar10", "cifar100", "idx"]
Profile = Literal["exponential", "step", "given"]
GroupRule = Literal["thirds", "counts"]


@dataclass(frozen=True)
class DataConfig:
    """The images of a run and how many of each class it may see."""

    source: Source = "digits"
    """Where images come from; "digits" is scikit-learn's 8x8 set and needs no file."""
    path: str = ""
    """File or folder of the data: npz file, folder by class, CIFAR archive or its folder, folder of idx files."""
    size: int | None = None
    """Folder only: resize the shorter side, then centre crop to size x size; None: images share one size already."""
    profile: Profile = "exponential"
    """Shape of the class counts; "given" keeps every image, for data that is long-tailed already."""
    ratio: float = 20.0
    """Imbalance ratio n_max / n_min of the exponential and step profiles."""
    class_order: tuple[int, ...] = ()
    """Classes from most to least frequent, by label; empty: label order."""
    rotate: int = 0
    """Rotate the class order to the left by that many places, so that other classes become rare."""
    split_seed: int = 0
    """Seed that chooses which images of a class are kept."""
    groups: GroupRule = "thirds"
    """Head/medium/tail: equal thirds of the classes by rank, or counts > 100 / 20..100 / < 20."""
    prior_exponent: float = 1.0
    """Class c is drawn with probability proportional to n_c^exponent: 1 natural, 0.5 square root, 0 class-balanced."""
    on_bad_file: Literal["stop", "skip"] = "stop"
    """Folder only: what to do with files that cannot be read as images."""
