"""Counter-based random numbers: every draw is a function of (seed, stream name, global sample number).

Nothing is stored and nothing advances, so a resumed run, another number of processes or one more method on the same run
leave every other draw as it was. The generator is Philox-4x32-10 (Salmon et al. 2011, "Parallel random numbers: as
easy as 1, 2, 3") in plain torch integer arithmetic: it runs on any device and compiles. The 64-bit key is a hash of
seed and stream name; the 128-bit counter is (block, 0, sample number low, sample number high).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int, int]) -> tuple[Tensor, ...]:
    """Philox-4x32-10: four 32-bit words from four 32-bit counters and two 32-bit keys, all held in int64."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        # The int64 product wraps modulo 2^64, which keeps both 32-bit halves intact.
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (p1 >> 32) & _MASK ^ c1 ^ k0, p1 & _MASK, (p0 >> 32) & _MASK ^ c3 ^ k1, p0 & _MASK
        k0, k1 = (k0 + _KEY_STEPS[0]) & _MASK, (k1 + _KEY_STEPS[1]) & _MASK
    return c0, c1, c2, c3


def stream_key(seed: int, stream: str) -> tuple[int, int]:
    """The two 32-bit key words of a named stream: FNV-1a over the name, begun from the seed.

    Plain integer arithmetic, because a compiler has to trace it; Philox does the mixing.
    """
    state = 0xCBF29CE484222325
    for symbol in [seed, *map(ord, stream)]:
        state = ((state ^ symbol) * 0x100000001B3) & 0xFFFFFFFFFFFFFFFF
    return state & _MASK, state >> 32


def words(seed: int, stream: str, index: Tensor, count: int) -> Tensor:
    """[B, count] int64 holding 32 random bits each, for the sample numbers `index` [B] (int64)."""
    blocks = -(-count // 4)
    block = torch.arange(blocks, device=index.device).expand(len(index), blocks)
    low, high = (index & _MASK)[:, None].expand_as(block), ((index >> 32) & _MASK)[:, None].expand_as(block)
    out = philox((block, torch.zeros_like(block), low, high), stream_key(seed, stream))
    return torch.stack(out, -1).flatten(1)[:, :count]


def uniform(seed: int, stream: str, index: Tensor, shape: tuple[int, ...] = ()) -> Tensor:
    """[B, *shape] float32 uniform on [0, 1), multiples of 2^-24."""
    return ((words(seed, stream, index, math.prod(shape)) >> 8) * 2.0**-24).float().view(-1, *shape)


def permutation(seed: int, stream: str, count: int, device: torch.device | None = None) -> Tensor:
    """[count] int64: 0 .. count - 1 in the order of 62 random bits each."""
    draw = words(seed, stream, torch.arange(count, device=device), 2)
    return torch.argsort((draw[:, 0] << 30) | (draw[:, 1] >> 2), stable=True)


def normal(seed: int, stream: str, index: Tensor, shape: tuple[int, ...] = ()) -> Tensor:
    """[B, *shape] float32 standard normal (Box-Muller).

    Computed in float64 and rounded once: a value does not depend on where in a vector register it was made.
    """
    count = math.prod(shape)
    u1, u2 = words(seed, stream, index, 2 * -(-count // 2)).double().mul_(2.0**-32).unflatten(1, (-1, 2)).unbind(-1)
    radius, angle = (-2 * torch.log(u1 + 2.0**-33)).sqrt(), 2 * math.pi * u2
    pairs = torch.stack([radius * torch.cos(angle), radius * torch.sin(angle)], -1).flatten(1)
    return pairs[:, :count].float().view(-1, *shape)
