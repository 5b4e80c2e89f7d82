"""Writes docs/ops.md from the docstrings of imbdiff.ops: `make docs`."""

from __future__ import annotations

import inspect
import json
import re
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

from imbdiff import ops
from imbdiff.ops._backends import CAPABILITIES
from imbdiff.ops._op import BACKENDS, REGISTRY

PAGE = Path(__file__).with_name("ops.md")
HEAD = """# Operations

Made by `make docs` from the docstrings of `imbdiff.ops`; change those.

```python
from imbdiff import ops
```

B is a batch, N and M are numbers of rows, D is what a row holds once it is flattened, K a number of branches. Every
operation takes any layout whose rows are dense without a copy. Which back end a call takes is decided by the tensors it
gets and what is built; `ops.use` forces one, `imbdiff doctor` shows which are there. How fast they are:
[performance.md](performance.md). How one is added: [adding-an-op.md](adding-an-op.md).
"""


def page() -> str:
    functions = [getattr(ops, name) for name in ops.__all__]
    index = "\n".join(f"- [`{f.__name__}`](#{f.__name__}): {summary(f)}" for f in functions)
    return "\n".join([HEAD, index, *(section(f) for f in functions)]) + "\n"


def summary(function: Callable[..., Any]) -> str:
    return (inspect.getdoc(function) or "").partition("\n")[0]


def section(function: Callable[..., Any]) -> str:
    parts = [f"\n## {function.__name__}", f"```python\n{signature(function)}\n```"]
    parts += [rendered(block) for block in blocks(inspect.getdoc(function) or "")]
    table = back_ends(function)
    return "\n\n".join([*parts, table] if table else parts)


def signature(function: Callable[..., Any]) -> str:
    """As it is written in the source: one line where it fits, else one argument a line."""
    plain = inspect.unwrap(function)  # a context manager wraps a generator
    arguments, keyword_only = [], False
    for p in inspect.signature(plain).parameters.values():
        if p.kind is p.KEYWORD_ONLY and not keyword_only:
            arguments.append("*")
            keyword_only = True
        default = (
            "" if p.default is p.empty else f" = {json.dumps(p.default) if isinstance(p.default, str) else p.default}"
        )
        stars = "**" if p.kind is p.VAR_KEYWORD else ""
        arguments.append(f"{stars}{p.name}: {p.annotation}{default}")
    if plain is not function:
        return f"with ops.{function.__name__}({', '.join(arguments)}): ..."
    returns = inspect.signature(plain).return_annotation
    line = f"ops.{function.__name__}({', '.join(arguments)}) -> {returns}"
    if len(line) <= 100:
        return line
    listed = "".join(f"    {argument},\n" for argument in arguments)
    return f"ops.{function.__name__}(\n{listed}) -> {returns}"


def blocks(text: str) -> list[str]:
    return [block.strip("\n") for block in re.split(r"\n\s*\n", text)]


def rendered(block: str) -> str:
    """Indented: an equation. `Args:` and the like: a list. Everything else: a paragraph, its files as links."""
    title, _, rest = block.partition("\n")
    if title in ("Args:", "Raises:"):
        return f"**{title[:-1]}**\n\n" + "\n".join(f"- {item}" for item in entries(rest))
    if title == "Returns:":
        return f"**Returns** {linked(' '.join(rest.split()))}"
    if block.startswith("    "):
        return f"```text\n{textwrap.dedent(block)}\n```"
    return "\n".join(linked(line) for line in block.splitlines())


def entries(text: str) -> list[str]:
    """`name: description`, whose further lines are indented deeper."""
    items: list[str] = []
    for line in textwrap.dedent(text).splitlines():
        if line.startswith(" "):
            items[-1] += " " + line.strip()
        else:
            items.append(line)
    return [re.sub(r"^([\w, ]+?):", lambda name: f"`{name[1]}`:".replace(", ", "`, `"), item) for item in items]


def linked(text: str) -> str:
    text = re.sub(r"`(imbdiff/[\w/]+\.py)`", r"[`\1`](../\1)", text)
    return re.sub(r"(?<![\w/`])docs/([\w-]+\.md)", r"[\1](\1)", text)


def back_ends(function: Callable[..., Any]) -> str:
    """The lines of the capability table. A function is called like its operation, with or without `_loss`."""
    op = function.__name__ if function.__name__ in REGISTRY else function.__name__.removesuffix("_loss")
    if op not in REGISTRY:
        return "" if function is ops.use else "Back ends: those of the operation that it calls."
    lines = ["| back end | device | types |", "|---|---|---|"]
    for backend in BACKENDS:
        if can := CAPABILITIES[op].get(backend):
            types = ", ".join(str(dtype).removeprefix("torch.") for dtype in can.dtypes)
            limit = "; at most {} {}".format(*can.most) if can.most is not None else ""
            lines.append(f"| {backend} | {can.device} | {types}{limit} |")
    return "\n".join(lines)


if __name__ == "__main__":
    PAGE.write_text(page())
