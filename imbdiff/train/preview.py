"""The sample grid that a run draws as it goes."""

from __future__ import annotations

import copy
from pathlib import Path

import torch

from imbdiff.data import ImageSet, class_rank
from imbdiff.data.grid import grid_picture
from imbdiff.diffusion import SamplingConfig, generate
from imbdiff.train.state import TrainState

COLUMNS = 10


def draw_grid(state: TrainState, train: ImageSet, config: SamplingConfig, file: Path) -> None:
    """One row a class, head to tail, the same noise in each column; always the averaged weights in eval mode."""
    averaged = copy.deepcopy(state.objective).eval()
    averaged.load_state_dict(state.ema.tensors)
    counts = train.counts.cpu()
    rank = torch.tensor(class_rank(counts))
    device = train.images.device
    images = generate(
        averaged.net,
        averaged.path,
        rank.repeat_interleave(COLUMNS).to(device),
        torch.arange(COLUMNS, device=device).repeat(len(rank)),
        image_shape=train.shape,
        null_label=train.num_classes,
        config=config,
    )
    captions = [f"{train.class_names[c]}  ({counts[c]})" for c in rank.tolist()]
    file.parent.mkdir(exist_ok=True)
    grid_picture(images.split(COLUMNS), captions).save(file)
