"""Import statements as ruff's isort would write them: one module a line, in three sections.

Runs in the command `ddp-lessons export`.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable
from typing import NamedTuple

LINE_LENGTH = 100


class Import(NamedTuple):
    """One name: `import module as alias`, or `from module import name as alias`."""

    module: str
    name: str = ""
    alias: str = ""

    @property
    def bound(self) -> str:
        """The name that it binds."""
        return self.alias or self.name or self.module.partition(".")[0]


def block(imports: Iterable[Import]) -> str:
    """The lines of all imports: future, standard library, third party, own."""
    sections: dict[int, set[Import]] = {}
    for one in imports:
        sections.setdefault(_section(one.module), set()).add(one)
    return "\n\n".join("\n".join(_lines(ones)) for _, ones in sorted(sections.items()))


def _section(module: str) -> int:
    top = module.partition(".")[0]
    if top == "__future__":
        return 0
    if top in sys.stdlib_module_names:
        return 1
    return 3 if top == "ddp_lessons" else 2


def _lines(imports: set[Import]) -> list[str]:
    whole = sorted((one for one in imports if not one.name), key=lambda o: (*_natural(o.module), o))
    lines = [f"import {one.module}" + (f" as {one.alias}" if one.alias else "") for one in whole]
    for module in sorted({one.module for one in imports if one.name}, key=_natural):
        of_module = [one for one in imports if one.module == module and one.name]
        plain = sorted((o.name for o in of_module if not o.alias), key=_by_kind)
        if plain:
            lines.append(_from(module, plain))
        renamed = sorted((o for o in of_module if o.alias), key=lambda o: _by_kind(o.name))
        lines += [_from(module, [f"{one.name} as {one.alias}"]) for one in renamed]
    return lines


def _from(module: str, names: list[str]) -> str:
    line = f"from {module} import {', '.join(names)}"
    if len(line) <= LINE_LENGTH:
        return line
    return "\n".join([f"from {module} import (", *(f"    {name}," for name in names), ")"])


def _by_kind(name: str) -> tuple[object, ...]:
    """CONSTANTS, then Classes, then the rest, as isort orders by type."""
    kind = 0 if name.isupper() and len(name) > 1 else 1 if name[:1].isupper() else 2
    return kind, *_natural(name)


def _natural(text: str) -> tuple[object, ...]:
    """Upper and lower case alike, and numbers by their size."""
    parts = re.split(r"(\d+)", text.lower())
    return [(part.isdigit(), int(part) if part.isdigit() else part) for part in parts], text
