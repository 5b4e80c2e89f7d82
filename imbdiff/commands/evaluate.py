"""imbdiff evaluate RUN, or imbdiff evaluate --real DIR --fake DIR --labels CSV."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console
from rich.progress import Progress

from imbdiff.commands import sample
from imbdiff.data import DataConfig, ImageSet, class_groups, class_rank, load_source, load_training_data
from imbdiff.errors import InputError
from imbdiff.evaluation import Extractor, Report, compare_table, evaluate, load_extractor, load_pair
from imbdiff.evaluation.yardsticks import ComparisonSets, comparison_sets, copies
from imbdiff.train.build import pick_device
from imbdiff.train.log import say
from imbdiff.train.run import TrainedRun, load_run

EPILOG = """
examples:
  imbdiff evaluate runs/ddpm
  imbdiff evaluate runs/cifar --reference test.npz --extractor resnet56.py:load --extractor-weights resnet56.th
  imbdiff evaluate --real photos/ --fake generated/ --labels labels.csv --extractor net.py:features

Writes report.json, report.md and ranks.png to RUN/report (or --out). Numbers compare only if reference, extractor and
the number of images agree; each report holds them.
"""


@dataclass(frozen=True)
class EvaluateCommand:
    """Coverage, label accuracy, FID, KID, Inception Score, precision, recall, density and memorisation: for all images,
    for head, medium and tail, and for each class.

    With a run: draws balanced samples from it (or takes those in RUN/samples if they are the ones wanted) and adds two
    yardsticks, copies of the training images and fresh real images. Without: compares two folders of images.
    """

    run: Annotated[str, tyro.conf.Positional] = ""
    """Run directory."""
    real: str = ""
    """Folder of real images, instead of a run."""
    fake: str = ""
    """Folder of generated images, instead of a run."""
    labels: str = ""
    """CSV with the columns file, label for both folders; not needed where each holds one folder a class."""
    out: str = ""
    """Where to write; RUN/report if not given."""
    per_class: int = 100
    """Images drawn of each class."""
    guidance_scale: float | None = None
    """As in `imbdiff sample`; the run's own if not given."""
    sampler: str | None = None
    """As in `imbdiff sample`; the run's own if not given."""
    steps: int | None = None
    """As in `imbdiff sample`; the run's own if not given."""
    reference: str = ""
    """npz of real images (images, labels) to measure against, such as a test set; the run's own source if not given."""
    extractor: str = "classifier"
    """classifier (8x8 digits), inception (the eval extra), or FILE.py:FUNCTION, called without arguments or with
    --extractor-weights, giving a callable on uint8 [N, C, H, W] with an optional method logits."""
    extractor_weights: str = ""
    """File handed to the extractor."""
    k: int = 5
    """Neighbours of precision, recall, density and coverage."""
    device: str = "auto"
    """cpu, cuda, or auto: for sampling."""


def main(args: list[str]) -> int:
    text = (EvaluateCommand.__doc__ or "") + EPILOG
    command = tyro.cli(EvaluateCommand, prog="imbdiff evaluate", description=text, args=args)
    if bool(command.run) == bool(command.real or command.fake):
        raise InputError("evaluate takes a run directory, or --real and --fake; see imbdiff evaluate --help")
    console = Console()
    extractor = load_extractor(command.extractor, command.extractor_weights)
    if command.run:
        reports = evaluate_run(command, extractor, console)
        folder = report_folder(command)
        say(console, compare_table(reports, groups=next(iter(reports.values())).groups))
    else:
        folder = Path(command.out or "report")
        say(console, evaluate_folders(command, extractor, folder).markdown())
    say(console, f"report: {folder / 'report.md'}\nplot: {folder / 'ranks.png'}")
    return 0


def evaluate_run(command: EvaluateCommand, extractor: Extractor, console: Console) -> dict[str, Report]:
    """Reports of the run and its two yardsticks, by name, saved."""
    run = load_run(command.run, partial(say, console), pick_device(command.device))
    sets = run_sets(run, command)
    images, protocol = run_samples(run, command, console)
    own = report_folder(command)
    measured: dict[str, tuple[Path, ImageSet, dict[str, Any]]] = {}
    if sets.fresh is not None:
        measured["fresh real images"] = (own / "fresh", sets.fresh, yardstick(protocol))
        measured["copies of training images"] = (
            own / "copies",
            copies(sets.train, command.per_class),
            yardstick(protocol),
        )
    measured[run.path.name] = (own, images, protocol)
    reports: dict[str, Report] = {}
    for name, (folder, fake, facts) in measured.items():
        # The fresh images come first: they are few, and every other row is measured at their number.
        reports[name] = measure(fake, sets, run, extractor, command.k, facts, reports.get("fresh real images"), console)
        reports[name].save(folder)
    return dict(reversed(reports.items()))


def report_folder(command: EvaluateCommand) -> Path:
    return Path(command.out or Path(command.run) / "report")


def run_sets(run: TrainedRun, command: EvaluateCommand) -> ComparisonSets:
    """The run's data again, checked to be the data that it trained on."""
    data = load_training_data(run.config.data)
    if data.split_hash != run.facts["sha256"]:
        raise InputError(
            f"the data of {run.path} has changed: its split was {run.facts['sha256'][:12]}..., now it is "
            f"{data.split_hash[:12]}...; put the data back that the run was trained on"
        )
    external = load_source(DataConfig(source="npz", path=command.reference)) if command.reference else None
    return comparison_sets(data, command.per_class, external)


def run_samples(run: TrainedRun, command: EvaluateCommand, console: Console) -> tuple[ImageSet, dict[str, Any]]:
    """The samples in RUN/samples if they were drawn as wanted, else new ones, kept there."""
    wanted = sample.SampleCommand(
        str(run.path),
        per_class=command.per_class,
        sampler=command.sampler,
        steps=command.steps,
        guidance_scale=command.guidance_scale,
    )
    folder, protocol = run.path / "samples", sample.sampling_protocol(run, wanted)
    kept = folder / "sampling.json"
    if kept.exists() and json.loads(kept.read_text(encoding="utf-8")) == protocol:
        return load_source(DataConfig(source="npz", path=str(folder / "samples.npz"), profile="given")), protocol
    images, protocol = sample.draw(run, wanted, console)
    sample.save(images, protocol, run.rank, folder)
    return images, protocol


def yardstick(protocol: dict[str, Any]) -> dict[str, Any]:
    """A yardstick shares the split with the run, and has no sampler."""
    return {"split_sha256": protocol["split_sha256"]}


def measure(
    fake: ImageSet,
    sets: ComparisonSets,
    run: TrainedRun,
    extractor: Extractor,
    k: int,
    protocol: dict[str, Any],
    like: Report | None,
    console: Console,
) -> Report:
    say(console, f"measuring {len(fake)} images of {fake.name} against {len(sets.reference)} real ones")
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("features")
        return evaluate(
            fake,
            sets.reference,
            extractor,
            groups={name: tuple(classes) for name, classes in run.facts["groups"].items()},
            rank=run.rank,
            train=sets.train if sets.held_out is not None else None,
            held_out=sets.held_out,
            k=k,
            protocol=protocol,
            like=like,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )


def evaluate_folders(command: EvaluateCommand, extractor: Extractor, folder: Path) -> Report:
    """The report of a folder of images against another, saved."""
    if not (command.real and command.fake):
        raise InputError("without a run, both --real DIR and --fake DIR are needed")
    real, fake = load_pair(command.real, command.fake, command.labels)
    counts = real.counts
    rank = class_rank(counts)
    groups = class_groups(counts, "thirds")
    protocol = {"fake": command.fake, "groups": "thirds of the classes by number of real images"}
    report = evaluate(fake, real, extractor, groups=groups, rank=rank, k=command.k, protocol=protocol)
    report.save(folder)
    return report
