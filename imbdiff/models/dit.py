"""DiT: a transformer over image patches, conditioned by adaptive layer norm that starts at zero (adaLN-Zero).

Peebles & Xie 2023, "Scalable diffusion models with transformers". Parameter names and shapes are those of the released
weights, and of SiT's, so that `load_state_dict` takes them as they are.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from imbdiff.diffusion.paths import split_variance
from imbdiff.errors import InputError
from imbdiff.models.types import Cond, LabelCond, Out

TIME_FEATURES = 256


@dataclass(frozen=True)
class DiTConfig:
    """The shape of a DiT."""

    image_size: int
    """Height and width of the images (or latents) in pixels."""
    channels: int
    """Channels of the images (or latents)."""
    num_classes: int
    """Number of classes; the null label is one more row of the label table."""
    patch_size: int
    """Height and width of a patch in pixels."""
    hidden_size: int
    """Width of a token."""
    depth: int
    """Number of transformer blocks."""
    num_heads: int
    """Number of attention heads."""
    mlp_ratio: float = 4.0
    """Width of the hidden MLP layer over that of a token."""
    learn_sigma: bool = False
    """Whether the output has as many channels again, for a learned variance."""
    label_init_std: float = 0.02
    """Standard deviation of the label table at the start; small data sets want about 1."""

    def __post_init__(self) -> None:
        for name in ("image_size", "channels", "num_classes", "patch_size", "hidden_size", "depth", "num_heads"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.image_size % self.patch_size:
            raise InputError(f"patch_size must divide image_size {self.image_size}, got {self.patch_size}")
        if self.hidden_size % self.num_heads:
            raise InputError(f"num_heads must divide hidden_size {self.hidden_size}, got {self.num_heads}")
        if self.hidden_size % 4:
            raise InputError(f"hidden_size must be a multiple of 4 (sin and cos of two axes), got {self.hidden_size}")


_WIDTHS = {"DiT-S": (384, 12, 6), "DiT-B": (768, 12, 12), "DiT-L": (1024, 24, 16), "DiT-XL": (1152, 28, 16)}

DIT_SIZES: dict[str, dict[str, Any]] = {
    f"{name}/{patch}": {"hidden_size": width, "depth": depth, "num_heads": heads, "patch_size": patch}
    for name, (width, depth, heads) in _WIDTHS.items()
    for patch in (2, 4, 8)
} | {
    # For a CPU. On a tiny data set the label table's scale matters most: at 0.02 the labels are hardly heard for long.
    "tiny": {"hidden_size": 64, "depth": 4, "num_heads": 4, "patch_size": 2, "label_init_std": 1.0},
}


def dit_config(name: str, *, image_size: int, channels: int, num_classes: int, **overrides: Any) -> DiTConfig:
    """The configuration of a named size, e.g. "DiT-XL/2"; `overrides` are further fields of DiTConfig."""
    if name not in DIT_SIZES:
        raise InputError(f"model must be one of {', '.join(DIT_SIZES)}, got {name!r}")
    fields = DIT_SIZES[name] | overrides
    return DiTConfig(image_size=image_size, channels=channels, num_classes=num_classes, **fields)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x * (1 + scale) + shift, with [B, D] shift and scale for tokens x [B, N, D]."""
    return x * (1 + scale[:, None]) + shift[:, None]


def time_features(t: Tensor) -> Tensor:
    """[cos(t w_i), sin(t w_i)] with w_i = 10000^(-i/128), i = 0..127: t [B] -> [B, 256] float32. t is used as it is."""
    half = TIME_FEATURES // 2
    w = torch.exp(torch.arange(half, dtype=torch.float32, device=t.device) * (-math.log(10000) / half))
    angle = t.float()[:, None] * w
    return torch.cat([angle.cos(), angle.sin()], 1)


def position_features(size: int, width: int, device: torch.device | None = None) -> Tensor:
    """[1, size * size, width]: for each patch, row by row, sin and cos of its column, then sin and cos of its row.

    Frequencies 10000^(-i/(width/4)), i = 0..width/4 - 1. That the column comes first is part of the released weights.
    """
    w = 10000 ** -(torch.arange(width // 4, dtype=torch.float64, device=device) / (width // 4))
    angle = torch.arange(size, dtype=torch.float64, device=device)[:, None] * w
    axis = torch.cat([angle.sin(), angle.cos()], 1)
    column = axis[None].expand(size, size, -1)
    row = axis[:, None].expand(size, size, -1)
    return torch.cat([column, row], 2).float().view(1, size * size, width)


class PatchEmbed(nn.Module):
    """Cuts the image into patches and maps each to a token: [B, C, S, S] -> [B, N, D], row by row."""

    def __init__(self, channels: int, patch_size: int, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels, width, patch_size, stride=patch_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)


class TimeEmbedder(nn.Module):
    """t [B] -> [B, D]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(TIME_FEATURES, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t: Tensor) -> Tensor:
        # The angles need float32 whatever the weights are: in bfloat16, t = 999 and t = 996 are one number.
        return self.mlp(time_features(t).to(next(self.mlp.parameters()).dtype))


class LabelEmbedder(nn.Module):
    """ids [B] -> [B, D]; the last row is the null label's. Dropping labels is the trainer's business."""

    def __init__(self, num_classes: int, width: int) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + 1, width)

    def forward(self, ids: Tensor) -> Tensor:
        return self.embedding_table(ids)


class Attention(nn.Module):
    """Self-attention over all tokens of an image."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    """Two linear layers with the tanh form of GELU between them."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class Block(nn.Module):
    """x + gate_a * attn(modulate(norm x)), then x + gate_m * mlp(modulate(norm x)); the six vectors come from c."""

    def __init__(self, width: int, num_heads: int, mlp_ratio: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.attn = Attention(width, num_heads)
        self.norm2 = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.mlp = Mlp(width, int(width * mlp_ratio))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.adaLN_modulation(c).chunk(6, 1)
        x = x + gate_a[:, None] * self.attn(modulate(self.norm1(x), shift_a, scale_a))
        return x + gate_m[:, None] * self.mlp(modulate(self.norm2(x), shift_m, scale_m))


class FinalLayer(nn.Module):
    """Tokens to the pixels of their patches: [B, N, D] -> [B, N, p * p * channels], channels fastest."""

    def __init__(self, width: int, outputs: int) -> None:
        super().__init__()
        self.norm_final = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.linear = nn.Linear(width, outputs)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(c).chunk(2, 1)
        return self.linear(modulate(self.norm_final(x), shift, scale))


class DiT(nn.Module):
    """The network: (x_t [B, C, S, S], t [B], labels [B]) -> native prediction [B, C, S, S]."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.config = config
        width, patch = config.hidden_size, config.patch_size
        self.grid_size = config.image_size // patch
        self.out_channels = config.channels * (2 if config.learn_sigma else 1)
        self.x_embedder = PatchEmbed(config.channels, patch, width)
        self.t_embedder = TimeEmbedder(width)
        self.y_embedder = LabelEmbedder(config.num_classes, width)
        # A frozen parameter, not a buffer: that is what it is in the released state dicts and parameter counts.
        self.pos_embed = nn.Parameter(torch.zeros(1, self.grid_size**2, width), requires_grad=False)
        self.blocks = nn.ModuleList(Block(width, config.num_heads, config.mlp_ratio) for _ in range(config.depth))
        self.final_layer = FinalLayer(width, patch * patch * self.out_channels)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """The paper's start: blocks are identities and the output is 0. Draws from torch's global generator."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        # The patch convolution is a linear map of a flattened patch and is started as one.
        nn.init.xavier_uniform_(self.x_embedder.proj.weight.view(self.config.hidden_size, -1))
        nn.init.zeros_(self.x_embedder.proj.bias)  # type: ignore[arg-type]
        nn.init.normal_(self.y_embedder.embedding_table.weight, std=self.config.label_init_std)
        for name, parameter in self.named_parameters():
            if name.startswith("t_embedder") and name.endswith("weight"):
                nn.init.normal_(parameter, std=0.02)
            elif "adaLN_modulation" in name or name.startswith("final_layer"):
                nn.init.zeros_(parameter)
        self.pos_embed.copy_(position_features(self.grid_size, self.config.hidden_size, self.pos_embed.device))

    @property
    def null_label(self) -> int:
        """The label id that means "no label"."""
        return self.config.num_classes

    @property
    def tap_names(self) -> dict[str, int]:
        """Feature names and the block after which they are taken. "mid" is after half of the blocks."""
        depth = self.config.depth
        return {f"blocks.{i}": i for i in range(depth)} | {"mid": max(depth // 2 - 1, 0)}

    @property
    def provides(self) -> frozenset[str]:
        """What methods may require of this network."""
        return frozenset(f"tap:{name}" for name in self.tap_names)

    def forward(self, x_t: Tensor, t: Tensor, cond: Cond, gate: Tensor | None = None, taps: Sequence[str] = ()) -> Out:
        """pred [B, C, S, S] (native to the path), feats: tokens [B, N, D] for each of `taps`, variance or None."""
        wanted = self._check(x_t, t, cond, gate, taps)
        c = self.t_embedder(t) + self.y_embedder(cond.ids)  # type: ignore[attr-defined]
        x = self.x_embedder(x_t) + self.pos_embed
        feats: dict[str, Tensor] = {}
        for i, block in enumerate(self.blocks):
            x = block(x, c)
            feats.update(dict.fromkeys(wanted.get(i, ()), x))
        pred, variance = split_variance(self._unpatchify(self.final_layer(x, c)), self.config.channels)
        return Out(pred, feats, variance)

    def _unpatchify(self, x: Tensor) -> Tensor:
        """[B, N, p * p * C] -> [B, C, S, S]; N is (row, column), and within a patch (row, column, channel)."""
        g, p = self.grid_size, self.config.patch_size
        x = x.view(len(x), g, g, p, p, self.out_channels)
        return x.permute(0, 5, 1, 3, 2, 4).reshape(len(x), self.out_channels, g * p, g * p)

    def _check(
        self, x_t: Tensor, t: Tensor, cond: Cond, gate: Tensor | None, taps: Sequence[str]
    ) -> dict[int, list[str]]:
        """Refuse what does not fit; the taps by block."""
        size, channels, classes = self.config.image_size, self.config.channels, self.config.num_classes
        if list(x_t.shape[1:]) != [channels, size, size] or x_t.ndim != 4:
            raise ValueError(f"expected images [B, {channels}, {size}, {size}], got {list(x_t.shape)}")
        if not isinstance(cond, LabelCond):
            raise TypeError(f"a DiT is conditioned by LabelCond, got {type(cond).__name__}")
        if list(t.shape) != [len(x_t)] or len(cond) != len(x_t):
            raise ValueError(
                f"expected {len(x_t)} times and labels, one for each image, got {list(t.shape)} and {len(cond)}"
            )
        if gate is not None:
            raise ValueError("this DiT has no expert capacity to gate: gate must be None (wrap it in a low-rank model)")
        # Only where the answer costs no wait for the device.
        if cond.ids.device.type == "cpu" and not torch.compiler.is_compiling() and len(cond):
            low, high = int(cond.ids.min()), int(cond.ids.max())
            if low < 0 or high > classes:
                raise ValueError(f"labels lie in 0..{classes - 1}, or {classes} for null, got {low}..{high}")
        names = self.tap_names
        wanted: dict[int, list[str]] = {}
        for tap in taps:
            if tap not in names:
                raise ValueError(f"unknown tap {tap!r}; this network has {', '.join(names)}")
            wanted.setdefault(names[tap], []).append(tap)
        return wanted
