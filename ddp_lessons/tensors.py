"""What a call's tensor looks like: its bytes, and its dtype and shape as text. Runs in workers."""

from __future__ import annotations

from typing import Any

_MOST = 4096  # looks kept; shapes that never repeat must not fill the memory
_known: dict[Any, tuple[int, str]] = {}

UNKNOWN = (-1, None)


def look(tensors: Any) -> tuple[int, str | None]:
    """The bytes and the look of a tensor, or of a list of them; (-1, None) for anything else."""
    try:
        kind = tensors.shape, tensors.dtype
        known = _known.get(kind)
        if known is None:
            known = int(tensors.nbytes), f"{str(kind[1]).rpartition('.')[2]} {tuple(kind[0])}"
            if len(_known) < _MOST:
                _known[kind] = known
        return known
    except (AttributeError, TypeError, RuntimeError):
        pass
    if not isinstance(tensors, list | tuple):
        return UNKNOWN
    parts = [look(tensor) for tensor in tensors]
    if not parts or min(nbytes for nbytes, _ in parts) < 0:
        return UNKNOWN
    return sum(nbytes for nbytes, _ in parts), f"{len(parts)} x {parts[0][1]}"
