"""All that a run changes while it runs, and nothing else: what a checkpoint holds."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from imbdiff.train import checkpoint
from imbdiff.train.config import TrainConfig, to_dict
from imbdiff.train.ema import EMA
from imbdiff.train.log import Meter
from imbdiff.train.objective import Objective


class TrainState:
    """Weights, their average, the optimizer's moments, running sums of the losses, and the step."""

    def __init__(self, config: TrainConfig, objective: Objective) -> None:
        self.config, self.objective = config, objective
        self.trainable = {name: p for name, p in objective.named_parameters() if p.requires_grad}
        optim = config.optim
        self.optimizer = torch.optim.AdamW(
            self.trainable.values(), optim.lr, optim.betas, weight_decay=optim.weight_decay, fused=True
        )
        self.ema, self.meter = EMA(objective, optim.ema), Meter()
        self.step = 0
        self.bad = 0
        """Steps in a row that were skipped as not finite."""

    def save(self, run: Path) -> None:
        moments = {
            f"moment.{key}.{name}": value
            for name, p in self.trainable.items()
            for key, value in self.optimizer.state[p].items()
        }
        sums = {f"sum.{name}": value for name, value in self.meter.sums.items()}
        state: dict[str, Tensor] = {**moments, **sums, "bad": torch.tensor(self.bad)}
        found = checkpoint.Checkpoint(
            self.step,
            model=checkpoint.file_names(self.objective.state_dict()),
            ema=checkpoint.file_names(self.ema.tensors),
            state=state,
        )
        checkpoint.save(run, found, to_dict(self.config), self.config.keep)

    def restore(self, found: checkpoint.Checkpoint) -> None:
        self.objective.load_state_dict(checkpoint.objective_names(found.model))
        self.ema.load(checkpoint.objective_names(found.ema))
        for key, value in found.state.items():
            kind, _, rest = key.partition(".")
            if kind == "moment":
                moment, _, name = rest.partition(".")
                self.optimizer.state[self.trainable[name]][moment] = value
            elif kind == "sum":
                self.meter.sums[rest] = value
        self.step, self.bad = found.step, int(found.state["bad"])
