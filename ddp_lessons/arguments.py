"""How a wrapper of a public function finds an argument of the call for which it stands.

Runs in workers, for collectives.py and joining.py.
"""

from __future__ import annotations

from typing import Any

Args = tuple[Any, ...]
Kwargs = dict[str, Any]


def argument(args: Args, kwargs: Kwargs, place: int, name: str) -> Any:
    """The argument, passed by place or by name; None if it was not passed."""
    return args[place] if place < len(args) else kwargs.get(name)
