"""Which failures of ranks are only the loss of another rank, or a wait given up. In the parent."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from ddp_lessons import stacks
from ddp_lessons.messages import ErrorRecord

if TYPE_CHECKING:
    from ddp_lessons.results import RankResult

# How gloo, the TCP store and NCCL say that another rank is gone (torch 2.13; gloo transport/tcp).
_LOST_PEER = re.compile(
    r"Connection closed by peer|Connection reset by peer|Broken pipe|Socket closed"
    r"|[Ff]ailed to recv, got 0 bytes|remote process has (?:terminated|exited)|NCCL.*remote error"
)
# And how they say that it did not come in time.
_GAVE_UP = re.compile(
    r"Timed out waiting \d+ ?ms|[Tt]imed out after|Application timeout caused pair closure"
    r"|[Ww]ait timeout|monitoredBarrier|Watchdog caught collective operation timeout"
)
# And how it says, under TORCH_DISTRIBUTED_DEBUG=DETAIL, that others came to another call.
_MISMATCH = re.compile(r"Detected mismatch between collectives on ranks")


def lost_partner(rank: RankResult) -> bool:
    """True for a rank that failed only because another one was gone, or did not come."""
    if rank.status == "died":
        return rank.exitcode == -6 and _says_so("\n".join(rank.shown_lines[-20:]))
    error = rank.error
    while error is not None:
        if _lost(error):
            return True
        error = error.previous
    return False


def gave_up(rank: RankResult) -> bool:
    """True for a rank whose call ended by its own timeout."""
    return rank.error is not None and bool(_GAVE_UP.search(rank.error.text)) and _lost(rank.error)


def _lost(error: ErrorRecord) -> bool:
    # In torch.distributed only: a data base may lose its connection, too.
    return _says_so(error.text) and stacks.position(error.frames).call is not None


def _says_so(text: str) -> bool:
    return any(pattern.search(text) for pattern in (_LOST_PEER, _GAVE_UP, _MISMATCH))
