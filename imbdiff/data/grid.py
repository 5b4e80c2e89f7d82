"""A picture of labelled images: one row a class, its name and count on the left."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from PIL import Image


def grid_picture(rows: Sequence[Tensor], captions: Sequence[str]) -> Image.Image:
    """Rows of uint8 images [n, C, H, W], enlarged to at least 32 pixels a side, captions beside them."""
    from PIL import Image, ImageDraw, ImageFont

    scale = max(1, -(-32 // rows[0].shape[-1]))
    font = ImageFont.load_default(size=14)
    margin = 12 + max(int(font.getlength(caption)) for caption in captions)
    tiles = [torch.nn.functional.pad(row, (1, 1, 1, 1), value=255) for row in rows]
    strips = [tile.permute(2, 0, 3, 1).flatten(1, 2) for tile in tiles]
    width = max(strip.shape[1] for strip in strips) * scale
    height = strips[0].shape[0] * scale
    canvas = Image.new("RGB", (margin + width, height * len(rows)), "white")
    draw = ImageDraw.Draw(canvas)
    for i, (strip, caption) in enumerate(zip(strips, captions, strict=True)):
        array = strip.squeeze(-1).cpu().numpy()
        picture = (
            Image.fromarray(array).convert("RGB").resize((strip.shape[1] * scale, height), Image.Resampling.NEAREST)
        )
        canvas.paste(picture, (margin, i * height))
        draw.text((6, i * height + height // 2), caption, fill="black", font=font, anchor="lm")
    return canvas
