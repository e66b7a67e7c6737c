"""What a rank does, as the system sees it: it computes, waits for a processor, has data on the way.

`local.py` asks for it while a run stands still. All but the processor time is known on Linux only.
"""

from __future__ import annotations

import contextlib
import glob
import os
import time
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from ddp_lessons.processes.base import CPU_SAMPLE_SECONDS
from ddp_lessons.results import Activity
from ddp_lessons.system import reaper
from ddp_lessons.system.host import processor_ns

CONNECTED = ("01", "08")  # states of a TCP socket: ESTABLISHED, CLOSE_WAIT (tcp_states.h)
PACKET = 1500  # bytes
BUSY = 0.1  # of the sampled time: a rank that uses the processor for more of it is busy


class ThreadState(NamedTuple):
    """Whether a thread uses a processor or waits for one, how often it has slept, and its times.

    On a starved machine a thread may get no processor for seconds: then neither its processor time
    nor its time in the queue grows. One that looks for something every 10 ms, as gloo's do, is
    often ready, too, but has slept often.
    """

    ready: bool
    slept: int
    used: float | None = None  # seconds of a processor; None if this kernel does not count
    waited: float = 0.0  # seconds in the queue for one, without a wait that lasts

    def never_slept_since(self, before: ThreadState) -> bool:
        return self.ready and before.ready and self.slept == before.slept

    def waited_since(self, before: ThreadState, seconds: float) -> float:
        """How many of these last seconds it was ready to run and did not."""
        if self.used is None or before.used is None:
            return 0.0
        waited = self.waited - before.waited
        if self.never_slept_since(before):  # all that it did not use
            waited = max(waited, seconds - (self.used - before.used))
        return min(max(waited, 0.0), seconds)


class Sample(NamedTuple):
    """What a process has done of late."""

    activity: Activity | None  # None if that is not known yet
    queued: bool  # it had to queue for a processor
    starved: float  # the share of the time in which one of its threads did


class ActivitySampler:
    """Compares what a process has done by now with what it had done before."""

    def __init__(self) -> None:
        self._sampled_at = 0.0
        self._used: float | None = None  # seconds until then; None before the first sample
        self._threads: dict[str, ThreadState] = {}

    def sample(self, pid: int) -> Sample | None:
        """What it does; None if the last sample is too young, or no file can be opened now."""
        now = time.monotonic()
        seconds = now - self._sampled_at
        if self._used is not None and seconds < CPU_SAMPLE_SECONDS:
            return None
        try:
            used, threads = cpu_seconds(pid), threads_of(pid)
        except OSError:  # too many are open
            return None
        activity: Activity | None = None
        has_queued, starved = False, 0.0
        if self._used is not None:
            pairs = [
                (thread, self._threads.get(name, ThreadState(False, thread.slept)))
                for name, thread in threads.items()
            ]
            never_slept = any(thread.never_slept_since(before) for thread, before in pairs)
            activity = "busy" if used - self._used > BUSY * seconds or never_slept else "idle"
            waits = any(t.ready and t.slept - before.slept <= 1 for t, before in pairs)
            queued = sum(thread.waited - before.waited for thread, before in pairs)
            has_queued = waits or queued > BUSY * seconds
            waited = [thread.waited_since(before, seconds) for thread, before in pairs]
            starved = max(waited, default=0.0) / seconds
        self._sampled_at, self._used, self._threads = now, used, threads
        activity = "suspended" if reaper.is_suspended(pid) else activity
        return Sample(activity, has_queued, starved)


def cpu_seconds(pid: int) -> float:
    """The processor time that a process has used so far; 0 if it has ended."""
    import psutil

    try:
        times = psutil.Process(pid).cpu_times()
    except psutil.NoSuchProcess:
        return 0.0
    return float(times.user + times.system)


def threads_of(pid: int) -> dict[str, ThreadState]:
    """The states of a process's threads (Linux)."""
    found = {}
    for thread in glob.iglob(f"/proc/{pid}/task/*"):
        with contextlib.suppress(OSError, ValueError, KeyError):
            with open(f"{thread}/status") as file:
                facts = dict(line.split(":", 1) for line in file)  # proc_pid_status(5)
            ready = facts["State"].split()[0] == "R"
            state = ThreadState(ready, int(facts["voluntary_ctxt_switches"]))
            with contextlib.suppress(ValueError):  # this kernel does not count
                used_ns, waited_ns = processor_ns(f"{thread}/schedstat")
                state = state._replace(used=used_ns / 1e9, waited=waited_ns / 1e9)
            found[thread] = state
    return found


def have_unsent_data(pids: Sequence[int]) -> bool:
    """Whether one of them wrote data to TCP sockets that the other side has not received (Linux).

    The kernel keeps it in the socket's send queue until then: proc_net_tcp, `tx_queue`. One packet
    or less does not count: it arrives soon, but may be acknowledged later. While rank 0 asks its
    store every 10 ms whether the others have joined, some answer is always unacknowledged.

    To read these tables takes the kernel some 10 ms: it looks through all its hash table.
    """
    networks: dict[str, int] = {}
    for pid in pids:
        with contextlib.suppress(OSError):
            networks.setdefault(os.readlink(f"/proc/{pid}/ns/net"), pid)
    unsent = {f"socket:[{inode}]" for pid in networks.values() for inode in _unsent(pid)}
    return bool(unsent) and any(unsent.intersection(_open_files(pid)) for pid in pids)


def _unsent(pid: int) -> Iterable[str]:
    """The inodes of the sockets with unsent data, in the network that a process sees."""
    for table in ("tcp", "tcp6"):
        with contextlib.suppress(OSError), open(f"/proc/{pid}/net/{table}") as lines:
            for fields in map(str.split, lines):
                if fields[3] in CONNECTED and int(fields[4].partition(":")[0], 16) > PACKET:
                    yield fields[9]


def _open_files(pid: int) -> Iterable[str]:
    for file in glob.iglob(f"/proc/{pid}/fd/*"):
        with contextlib.suppress(OSError):
            yield os.readlink(file)
