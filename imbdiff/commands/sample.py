"""imbdiff sample RUN: labelled images from a trained run."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import tyro
from rich.console import Console
from rich.progress import Progress

from imbdiff.data import ImageSet
from imbdiff.data.grid import grid_picture
from imbdiff.diffusion import SamplingConfig, generate
from imbdiff.errors import InputError
from imbdiff.evaluation import save_images
from imbdiff.files import write_text
from imbdiff.train.build import pick_device
from imbdiff.train.log import say
from imbdiff.train.run import TrainedRun, load_run


@dataclass(frozen=True)
class SampleCommand:
    """Draw labelled images, the same number of each class, from a run's averaged weights.

    Writes samples.npz (images uint8 [N, H, W, C], labels), grid.png (one row a class, head to tail) and sampling.json.
    Image i's noise depends on the seed and i alone.
    """

    run: Annotated[str, tyro.conf.Positional]
    """Run directory."""
    per_class: int = 10
    """Images of each class."""
    out: str = ""
    """Where to write; RUN/samples if not given."""
    sampler: str | None = None
    """ddim, ddpm_ancestral, dpmpp_2m (ddpm path); euler, heun (flow path). The run's own if not given."""
    steps: int | None = None
    """Sampler steps. The run's own if not given."""
    guidance_scale: float | None = None
    """null + scale (cond - null): 1 is unguided. The run's own if not given."""
    seed: int | None = None
    """Of the noise. The run's own if not given."""
    parity: bool | None = None
    """ddpm_ancestral with the clip quirk of the CBDM lineage. The run's own if not given."""
    png: bool = False
    """Also write one PNG file an image, in a folder for each class, and labels.csv."""
    device: str = "auto"
    """cpu, cuda, or auto."""


def main(args: list[str]) -> int:
    command = tyro.cli(SampleCommand, prog="imbdiff sample", args=args)
    console = Console()
    run = load_run(command.run, partial(say, console), pick_device(command.device))
    images, protocol = draw(run, command, console)
    folder = Path(command.out) if command.out else run.path / "samples"
    save(images, protocol, run.rank, folder)
    if command.png:
        save_images(folder / "png", images)
    say(console, f"{len(images)} images: {folder / 'samples.npz'}\ngrid: {folder / 'grid.png'}")
    return 0


def draw(run: TrainedRun, command: SampleCommand, console: Console) -> tuple[ImageSet, dict[str, Any]]:
    """`per_class` images of each class, and the protocol that made them."""
    if command.per_class < 1:
        raise InputError(f"--per-class must be at least 1, got {command.per_class}")
    config = sampling_config(run, command)
    device = next(run.objective.parameters()).device
    labels = torch.arange(run.num_classes, device=device).repeat(command.per_class)
    say(console, f"{run.path}: drawing {len(labels)} images ({config.sampler}, {config.steps} steps)")
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(f"sampling {run.path}", total=len(labels))
        images = generate(
            run.objective.net,
            run.objective.path,
            labels,
            torch.arange(len(labels), device=device),
            image_shape=run.image_shape,
            null_label=run.num_classes,
            config=config,
            progress=lambda n: bar.advance(task, n),
        )
    names = tuple(run.facts["class_names"])
    return ImageSet(images.cpu(), labels.cpu(), names, str(run.path)), sampling_protocol(run, command)


def sampling_config(run: TrainedRun, command: SampleCommand) -> SamplingConfig:
    """The run's sampling settings with what the command line says instead."""
    given = {k: getattr(command, k) for k in ("sampler", "steps", "guidance_scale", "seed", "parity")}
    config = replace(run.config.sampling, **{k: v for k, v in given.items() if v is not None})
    return config.resolved(run.objective.path)


def sampling_protocol(run: TrainedRun, command: SampleCommand) -> dict[str, Any]:
    """All that decides which images come out."""
    return {
        "run": run.path.name,
        "methods": list(run.config.methods),
        "step": run.step,
        "weights": f"ema {run.config.optim.ema}",
        "per_class": command.per_class,
        "path": run.config.diffusion.path,
        "split_sha256": run.facts["sha256"],
        "training_seed": run.config.seed,
        **{("sampling_seed" if k == "seed" else k): v for k, v in asdict(sampling_config(run, command)).items()},
    }


def save(images: ImageSet, protocol: dict[str, Any], rank: list[int], folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # The protocol is written last: samples are used again only where it says that they are the ones wanted.
        (folder / "sampling.json").unlink(missing_ok=True)
        array = images.images.permute(0, 2, 3, 1).numpy()
        np.savez(
            folder / "samples.npz", images=array, labels=images.labels.numpy(), class_names=np.array(images.class_names)
        )
        rows = [images.images[images.labels == c][:10] for c in rank]
        grid_picture(rows, [images.class_names[c] for c in rank]).save(folder / "grid.png")
        write_text(folder / "sampling.json", json.dumps(protocol, indent=2))
    except OSError as error:
        raise InputError(f"cannot write samples to {folder}: {error}") from error
