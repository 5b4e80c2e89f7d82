"""Published remedies for class imbalance, one method a file, all switches on one training step."""

from imbdiff.methods.cbdm import CBDM, CBDMConfig
from imbdiff.methods.ddpm import DDPM, DDPMConfig
from imbdiff.methods.oc import OC, OCConfig
from imbdiff.methods.protocol import Batch, Branch, Method, MethodConfig, Pair, Scalar

METHODS: dict[str, type[Method]] = {"ddpm": DDPM, "cbdm": CBDM, "oc": OC}

__all__ = [
    "CBDM",
    "DDPM",
    "METHODS",
    "OC",
    "Batch",
    "Branch",
    "CBDMConfig",
    "DDPMConfig",
    "Method",
    "MethodConfig",
    "OCConfig",
    "Pair",
    "Scalar",
]
