"""Every setting of a run, as frozen dataclasses; presets are data."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields, is_dataclass
from typing import Any, Literal

from imbdiff.data import DataConfig
from imbdiff.diffusion import SamplingConfig
from imbdiff.errors import InputError
from imbdiff.methods import CBDMConfig, OCConfig


@dataclass(frozen=True)
class ModelConfig:
    """The diffusion transformer. Image size, channels and classes come from the data."""

    size: str = "tiny"
    """"tiny" (width 64, depth 4, patch 2) or an official size: DiT-S/2 to DiT-XL/8."""
    hidden_size: int | None = None
    """Width, instead of the size's."""
    depth: int | None = None
    """Blocks, instead of the size's."""
    num_heads: int | None = None
    """Attention heads, instead of the size's."""
    patch_size: int | None = None
    """Pixels on a side of a token, instead of the size's."""
    label_init_std: float | None = None
    """Standard deviation of the label embeddings at the start: 0.02 in the official sizes, 1.0 in "tiny"."""
    learn_sigma: bool = False
    """Twice the output channels, the second half unused by the losses here; as in the released weights."""


@dataclass(frozen=True)
class DiffusionConfig:
    """How images are noised and what the network predicts."""

    path: Literal["ddpm", "flow"] = "ddpm"
    """ddpm: 1000 steps, linear betas, predicts eps. flow: linear path, predicts the velocity (SiT)."""
    drop_prob: float = 0.1
    """Probability that the label is replaced by the null label, for classifier-free guidance."""
    drop_scope: Literal["sample", "batch"] = "sample"
    """Labels are dropped sample by sample, or for the whole batch at once as in the CBDM lineage."""


@dataclass(frozen=True)
class OptimConfig:
    """AdamW."""

    lr: float = 1e-3
    """Peak learning rate."""
    warmup: int = 100
    """Steps of linear warm-up."""
    schedule: Literal["constant", "cosine"] = "cosine"
    """After the warm-up: constant, or a cosine to zero at the last step."""
    betas: tuple[float, float] = (0.9, 0.99)
    """Decay of the running moments."""
    weight_decay: float = 0.0
    """Decoupled weight decay."""
    clip: float = 1.0
    """Largest norm of the gradient."""
    ema: float = 0.9999
    """Decay of the weight average, reached by warm-up; samples are always drawn from the average."""


@dataclass(frozen=True)
class TrainConfig:
    """A run. The same command starts it and resumes it."""

    out: str = "runs/run"
    """Run directory."""
    methods: tuple[Literal["ddpm", "cbdm", "oc"], ...] = ("ddpm",)
    """Remedies, one or several: ddpm (none), cbdm, oc. Their settings are --cbdm.* and --oc.*"""
    steps: int = 2000
    """Optimizer steps."""
    batch_size: int = 64
    """Images a step."""
    accumulate: int = 1
    """Slices of a batch that are run one after the other; OC's and other pairwise losses see one slice."""
    seed: int = 0
    """Of the initial weights, the data order and every draw."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16: autocast over float32 weights."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: a GPU if there is one."""
    flip: bool = False
    """Mirror half of the images; not for digits or text."""
    log_every: int = 50
    """Steps between lines of metrics.jsonl."""
    grid_every: int = 1000
    """Steps between sample grids."""
    checkpoint_every: int = 500
    """Steps between checkpoints."""
    keep: int = 2
    """Newest checkpoints kept."""
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    cbdm: CBDMConfig = field(default_factory=CBDMConfig)
    oc: OCConfig = field(default_factory=OCConfig)

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "accumulate", "log_every", "grid_every", "checkpoint_every"):
            if getattr(self, name) < 1:
                raise InputError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(self, name)}")
        if self.batch_size % self.accumulate:
            raise InputError(
                f"--batch-size {self.batch_size} must be a multiple of --accumulate {self.accumulate}, "
                "so that all slices are equal"
            )
        if self.keep < 2:
            raise InputError(f"--keep must be at least 2, so that a torn checkpoint loses little, got {self.keep}")
        if not 0 <= self.diffusion.drop_prob < 1:
            raise InputError(f"--diffusion.drop-prob must lie in [0, 1), got {self.diffusion.drop_prob}")
        if not self.methods or len(set(self.methods)) < len(self.methods):
            raise InputError(f"--methods wants different names of ddpm, cbdm, oc, got {list(self.methods)}")


PRESETS: dict[str, tuple[str, TrainConfig]] = {
    "digits": (
        "Real 8x8 handwritten digits, long-tailed 20:1. Minutes on a CPU, no download.",
        TrainConfig(out="runs/digits", optim=OptimConfig(lr=3e-3), sampling=SamplingConfig(guidance_scale=2.0)),
    ),
    "cifar10-lt": (
        "CIFAR-10-LT, 100:1, DiT-S/2 on pixels. --data.path names the official archive.",
        TrainConfig(
            out="runs/cifar10-lt",
            steps=300_000,
            batch_size=128,
            flip=True,
            log_every=100,
            grid_every=5000,
            checkpoint_every=5000,
            data=DataConfig(source="cifar10", ratio=100.0),
            model=ModelConfig(size="DiT-S/2"),
            optim=OptimConfig(lr=2e-4, warmup=5000, schedule="constant", betas=(0.9, 0.999)),
        ),
    ),
    "images": (
        "Your own labelled images: --data.source folder|npz|idx --data.path PATH, used as they are.",
        TrainConfig(
            out="runs/images",
            steps=100_000,
            checkpoint_every=2000,
            data=DataConfig(source="folder", profile="given"),
            model=ModelConfig(size="DiT-S/4"),
            optim=OptimConfig(lr=2e-4, warmup=1000, betas=(0.9, 0.999)),
        ),
    ),
}


def to_dict(config: Any) -> dict[str, Any]:
    """The configuration as JSON-ready data; tuples become lists."""
    return {k: _plain(v) for k, v in asdict(config).items()}


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    return list(value) if isinstance(value, tuple) else value


def from_dict(cls: type, data: dict[str, Any]) -> Any:
    """The inverse of `to_dict`. A setting that is younger than the file has its default; an unknown one is an error."""
    if wrong := sorted(set(data) - {f.name for f in fields(cls)}):
        raise InputError(f"{cls.__name__} has no setting {', '.join(wrong)}; was the file written by a newer imbdiff?")
    defaults = cls()
    values = {}
    for name, value in data.items():
        default = getattr(defaults, name)
        if is_dataclass(default):
            value = from_dict(type(default), value)
        elif isinstance(value, list):
            value = tuple(value)
        values[name] = value
    return cls(**values)


def difference(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[str]:
    """Lines "name: old -> new" for each setting that differs."""
    lines = []
    for name in sorted(old.keys() | new.keys()):
        a, b = old.get(name, "absent"), new.get(name, "absent")
        if isinstance(a, dict) and isinstance(b, dict):
            lines += difference(a, b, f"{prefix}{name}.")
        elif a != b:
            lines.append(f"{prefix}{name}: {a} -> {b}")
    return lines
