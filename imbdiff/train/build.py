"""From a configuration to the objects of a run."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn

from imbdiff.diffusion import make_path
from imbdiff.errors import InputError
from imbdiff.methods import METHODS, Method
from imbdiff.models import DiT, dit_config
from imbdiff.train.config import ModelConfig, TrainConfig
from imbdiff.train.objective import Objective


def build_network(config: ModelConfig, image_shape: tuple[int, int, int], num_classes: int) -> DiT:
    channels, height, width = image_shape
    if height != width:
        raise InputError(f"DiT wants square images, got {height} x {width}; --data.size N crops them")
    base = dit_config(
        config.size, image_size=height, channels=channels, num_classes=num_classes, learn_sigma=config.learn_sigma
    )
    own = {
        name: getattr(config, name) for name in ("hidden_size", "depth", "num_heads", "patch_size", "label_init_std")
    }
    return DiT(replace(base, **{name: value for name, value in own.items() if value is not None}))


def build_objective(config: TrainConfig, image_shape: tuple[int, int, int], num_classes: int) -> Objective:
    """Network and methods; their initial weights are the seed's alone, and torch's own generator is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        net: nn.Module = build_network(config.model, image_shape, num_classes)
        methods: dict[str, Method] = {name: METHODS[name](getattr(config, name, None)) for name in config.methods}
    return Objective(net, make_path(config.diffusion.path), methods)


def pick_device(name: str) -> torch.device:
    if name == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: torch sees no GPU (imbdiff doctor says more); use --device cpu")
    return torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)
