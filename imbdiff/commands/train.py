"""imbdiff train PRESET: one command starts a run and resumes it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Annotated

import tyro
from rich.console import Console

from imbdiff.train.config import PRESETS, TrainConfig, to_dict
from imbdiff.train.log import say
from imbdiff.train.loop import train

EPILOG = """
examples:
  imbdiff train digits --out runs/ddpm
  imbdiff train digits --out runs/cbdm --methods cbdm --cbdm.tau 0.1 --cbdm.law uniform
  imbdiff train digits --out runs/balanced --data.prior-exponent 0
  imbdiff train cifar10-lt --data.path cifar-10-binary.tar.gz
  imbdiff train images --data.path photos/ --data.size 64 --model.size DiT-S/4
  imbdiff train digits --print-config      every setting, resolved, as JSON

The same command resumes a run that was interrupted, bit for bit on a CPU. A run directory that holds other settings
is refused with a list of the differences; --fresh deletes that run and starts over.
"""


@dataclass(frozen=True)
class TrainCommand:
    """Train a class-conditional diffusion transformer on long-tailed data."""

    config: Annotated[TrainConfig, tyro.conf.arg(name="")]
    fresh: bool = False
    """Delete the run in --out, if there is one, and start over."""
    print_config: bool = False
    """Print every setting as JSON and stop."""


def main(args: list[str]) -> int:
    command = tyro.extras.overridable_config_cli(
        {name: (text, TrainCommand(config)) for name, (text, config) in PRESETS.items()},
        prog="imbdiff train",
        description="Train a class-conditional diffusion transformer on long-tailed data. Choose a preset; every "
        "setting of it can be changed, see `imbdiff train digits --help`." + EPILOG,
        args=args,
        config=(tyro.conf.FlagCreatePairsOff,),
    )
    if command.print_config:
        print(json.dumps(to_dict(command.config), indent=2))
        return 0
    console = Console()
    run = train(command.config, fresh=command.fresh, console=console)
    say(console, f"run: {run}\nnext: imbdiff evaluate {run}")
    return 0
