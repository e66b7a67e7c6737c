"""How gloo, NCCL and torch's store report that another rank is gone, did not come, or differs.

Ranks ask whether a failed call had met the others; the parent, whether an error is secondary.
"""

from __future__ import annotations

import re

# A rank is gone (torch 2.13; gloo transport/tcp).
_LOST_PEER = re.compile(
    r"Connection closed by peer|Connection reset by peer|Broken pipe|Socket closed"
    r"|[Ff]ailed to recv, got 0 bytes|remote process has (?:terminated|exited)|NCCL.*remote error"
)
# A rank did not come in time.
_GAVE_UP = re.compile(
    r"Timed out waiting \d+ ?ms|[Tt]imed out after|Operation timed out"
    r"|Application timeout caused pair closure|[Ww]ait timeout|monitoredBarrier"
    r"|Watchdog caught collective operation timeout"
)
# Another rank makes another call, under TORCH_DISTRIBUTED_DEBUG=DETAIL.
_MISMATCH = re.compile(r"Detected mismatch between collectives on ranks")


def timed_out(text: str) -> bool:
    """Whether an error's text tells of a rank that did not come in time."""
    return _GAVE_UP.search(text) is not None


def is_loss(text: str) -> bool:
    """Whether an error's text tells of another rank: it is gone, did not come, or differs."""
    return any(pattern.search(text) for pattern in (_LOST_PEER, _GAVE_UP, _MISMATCH))
