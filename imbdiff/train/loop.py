"""The training loop. A step is a pure function of the weights, the optimizer's moments and the step number."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor

from imbdiff.data import DataOrder, load_training_data
from imbdiff.errors import InputError
from imbdiff.train import checkpoint
from imbdiff.train.batch import BatchSource
from imbdiff.train.build import build_objective, pick_device
from imbdiff.train.config import TrainConfig
from imbdiff.train.guards import disk_errors, stop_requests
from imbdiff.train.log import Metrics, Reporter, describe_split, say
from imbdiff.train.preview import draw_grid
from imbdiff.train.run import open_run
from imbdiff.train.schedule import learning_rate
from imbdiff.train.state import TrainState

MOST_BAD_STEPS = 10


def train(config: TrainConfig, *, fresh: bool = False, console: Console | None = None) -> Path:
    """Train until `config.steps`, going on from the newest whole checkpoint; returns the run directory."""
    console = console or Console()
    device = pick_device(config.device)
    data = load_training_data(config.data)
    images = data.train.to(device)
    objective = build_objective(config, images.shape, images.num_classes).to(device).train()
    sampling = config.sampling.resolved(objective.path)
    # Only settings that work get a run directory.
    run = open_run(config, data, fresh)
    say(console, describe_split(data))
    source = BatchSource(
        images=images,
        order=DataOrder(images.labels, data.counts, config.seed, config.data.prior_exponent),
        path=objective.path,
        counts=data.counts.to(device),
        seed=config.seed,
        drop_prob=config.diffusion.drop_prob,
        drop_scope=config.diffusion.drop_scope,
        flip=config.flip,
    )
    state = TrainState(config, objective)
    if found := checkpoint.load_latest(run, partial(say, console), str(device)):
        state.restore(found)
        say(console, f"{run}: going on from step {state.step}")
    metrics = Metrics(run / "metrics.jsonl", state.step)
    name = "+".join(config.methods)
    with (
        Reporter(name, state.step, config.steps, config.batch_size, console) as report,
        stop_requests() as stop,
        disk_errors(run),
    ):
        while state.step < config.steps and not stop:
            facts = take_step(config, state, source, report)
            report.advance(state.step)
            last = state.step == config.steps
            if last or state.step % config.log_every == 0:
                row = state.meter.read()
                facts["images_per_second"] = round(report.images_per_second(state.step), 1)
                metrics.write({"step": state.step, "images": state.step * config.batch_size, **row, **facts})
                report.row(state.step, row)
            if last or state.step % config.grid_every == 0:
                draw_grid(state, images, sampling, run / "grids" / f"step-{state.step:08d}.png")
            if last or stop or state.step % config.checkpoint_every == 0:
                state.save(run)
        if stop:
            say(
                report.console,
                f"{stop[0]}: stopped and saved at step {state.step}; the same command goes on from there",
            )
    return run


def take_step(config: TrainConfig, state: TrainState, source: BatchSource, report: Reporter) -> dict[str, float]:
    """One optimizer step, or none: where a loss or the gradient is not finite, no weight changes."""
    lr = learning_rate(
        (state.step + 1) * config.batch_size,
        peak=config.optim.lr,
        warmup=config.optim.warmup * config.batch_size,
        total=config.steps * config.batch_size,
        schedule=config.optim.schedule,
    )
    losses = backward(config, state, source)
    norm = torch.nn.utils.clip_grad_norm_(state.trainable.values(), config.optim.clip)
    state.step += 1
    # The one value a step that the host waits for: a step must be refused before it is taken.
    if math.isfinite(float(sum(losses.values()) + norm)):
        state.optimizer.param_groups[0]["lr"] = lr
        state.optimizer.step()
        state.ema.update(state.objective, state.step)
        state.meter.add(losses)
        state.bad = 0
    else:
        refuse(state, losses, norm, report)
    state.optimizer.zero_grad(set_to_none=True)
    return {"lr": lr, "grad_norm": float(norm)}


def backward(config: TrainConfig, state: TrainState, source: BatchSource) -> dict[str, Tensor]:
    """Losses by term, averaged over the slices of the batch; the gradient of their sum is left in the parameters."""
    mean: dict[str, Tensor] = {}
    device = source.images.images.device
    keys = torch.arange(config.batch_size, device=device) + state.step * config.batch_size
    for key in keys.chunk(config.accumulate):
        with torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16"):
            losses = state.objective(source.batch(state.step, key))
        torch.stack(list(losses.values())).sum().div(config.accumulate).backward()
        for name, value in losses.items():
            mean[name] = mean.get(name, 0.0) + value.detach() / config.accumulate
    return mean


def refuse(state: TrainState, losses: dict[str, Tensor], norm: Tensor, report: Reporter) -> None:
    """Name the step and the term that is not finite; stop the run after ten in a row."""
    state.bad += 1
    values = {name: float(value) for name, value in losses.items()} | {"gradient norm": float(norm)}
    cause = ", ".join(f"{name} = {value}" for name, value in values.items() if not math.isfinite(value))
    say(report.console, f"step {state.step}: {cause}; step skipped ({state.bad} in a row)")
    if state.bad >= MOST_BAD_STEPS:
        raise InputError(
            f"{state.bad} steps in a row were not finite (step {state.step}: {cause}); stopped. The newest checkpoint "
            "is from before; try a smaller --optim.lr or --precision fp32."
        )
