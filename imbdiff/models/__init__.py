"""Networks, and the types at their border."""

from imbdiff.models.dit import DIT_SIZES, DiT, DiTConfig, dit_config
from imbdiff.models.types import Cond, LabelCond, Out

__all__ = ["DIT_SIZES", "Cond", "DiT", "DiTConfig", "LabelCond", "Out", "dit_config"]
