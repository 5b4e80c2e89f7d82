"""The command `imbdiff`: finds the subcommand, prints errors that the user can mend without a traceback."""

from __future__ import annotations

import difflib
import importlib
import sys

from imbdiff import __version__
from imbdiff.errors import InputError

COMMANDS = {
    "train": "train a diffusion transformer on long-tailed data; the same command resumes",
    "sample": "draw labelled images from a run",
    "evaluate": "measure a run, or two folders of images, for head, medium and tail",
    "compare": "one table of several evaluated runs",
    "demo": "ddpm and one remedy on long-tailed digits, from training to the table, in minutes",
    "doctor": "what is installed, what is missing, how to add it",
}

USAGE = """usage: imbdiff COMMAND [--help] ...

Diffusion models on long-tailed data.

{commands}

start here:
  imbdiff demo                               the whole way on real handwritten digits
  imbdiff train digits --out runs/ddpm       a run of your own
  imbdiff evaluate runs/ddpm                 its quality for frequent and rare classes
  imbdiff train --help                       presets; imbdiff train digits --help lists every setting
"""


def main(argv: list[str] | None = None) -> int:
    """Run one command; the exit status is 0, or 2 where something that came from outside is wrong."""
    args = sys.argv[1:] if argv is None else argv
    if not args or args[0] in ("-h", "--help"):
        print(USAGE.format(commands="\n".join(f"  {name:10} {text}" for name, text in COMMANDS.items())), end="")
        return 0
    if args[0] == "--version":
        print(__version__)
        return 0
    try:
        if args[0] not in COMMANDS:
            near = difflib.get_close_matches(args[0], COMMANDS, 1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise InputError(f"unknown command {args[0]!r}{hint} The commands are {', '.join(COMMANDS)}.")
        return importlib.import_module(f"imbdiff.commands.{args[0]}").main(args[1:])
    except InputError as error:
        print(f"imbdiff: error: {error}", file=sys.stderr)
        return 2


def script() -> None:
    sys.exit(main())


if __name__ == "__main__":
    script()
