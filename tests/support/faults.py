"""Faults for a run, one function each, and what a diagnosis must say of them.

`train` is a loop that every rank runs; at one moment the victim does something wrong. The campaign
(benchmarks/faults.py) draws them at random, and tests/end_to_end/test_faults.py runs a fixed
sample.
"""

from __future__ import annotations

import inspect
import itertools
import os
import queue
import resource
import signal
import stat
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol

from ddp_lessons import Run, span

STEPS = 4
SETTINGS = (
    "plain", "detail", "own timeout", "subgroup", "beside a thread", "in a thread", "%%time",
)  # fmt: skip
OWN_TIMEOUT = timedelta(seconds=2)  # of the group, in a setting of that name
TIMED = "<timed exec>"  # the name of code below %%time
SLOW = ("skipped compiled",)  # faults that need more than the timeout of the others
MARK = "the fault"  # the span that says when it happened
NOTE = "DDP_LESSONS_FAULT_NOTE"  # an environment variable: a file for the time of it
FROM_OUTSIDE = ("forkserver killed", "parent interrupted", "parent killed")


def judge(fault: str, victim: int, world_size: int, run: Run, setting: str = "plain") -> str:
    """What is wrong with the verdict on a run with this fault; "" if nothing is."""
    expected, found = FAULTS[fault], run.verdict
    if (fault, setting) == ("swapped alike", "%%time"):
        return ""  # its lines are other ones, and without their text nothing shows that they swap
    if fault in WARNED:
        # torch's check under DETAIL takes a send for a call that the other ranks do not make.
        stopped = (fault, setting) == ("message too short", "detail") and world_size > 2
        said = "torch counts the sends and recvs" if stopped else WARNED[fault]
        return "" if said in run.explain() else f"{said!r} is not said"
    if not expected.kinds:
        return "" if found is None else f"it was fine, but: {found.title}"
    if found is None or found.kind not in expected.kinds:
        return f"kind is {found and found.kind!r}, not one of {expected.kinds}"
    if (what := _not_shown(expected, found.text(), setting)) is not None:
        return f"{what!r} is not shown"
    # Of two ranks that disagree, nobody can say which is right.
    fair = [(victim,), (0, 1)] if world_size == 2 and found.kind in SIDES else [(victim,)]
    if fault in ("message too long", "other tag"):
        fair = [tuple(sorted((victim, (victim + 1) % world_size)))]
    if fault not in FROM_OUTSIDE and found.ranks not in fair:
        return f"it blames {found.ranks}, not rank {victim}"
    return ""


def _not_shown(expected: Fault, text: str, setting: str) -> str | None:
    """What a verdict should show and does not."""
    if expected is FAULTS["late for a wait"] and setting == "detail":
        return None  # there the ranks wait before they come to `wait`
    if setting == "%%time" and expected.line in inspect.getsource(sys.modules[__name__]):
        return None if TIMED in text else TIMED  # the text of the line is not known
    return None if expected.line in text else expected.line


WARNED = {
    "swapped alike": "not the same on all ranks",
    "message too short": "whose recv expects float32 (2,)",
}
SIDES = (
    "skipped collective",
    "different collectives",
    "tensor mismatch",
    "groups in different order",
)


class Fault(NamedTuple):
    """What the victim does, and which verdicts name it: kinds, and a text of the line to blame."""

    act: Callable[[int], None] | None  # at the victim's moment; None: the loop itself does it
    kinds: tuple[str, ...]  # of Verdict.kind, any of them
    line: str  # part of the source that the verdict must show; "" for none


def program(setting: str) -> Callable[..., int]:
    """`train`; in the setting "%%time" compiled as IPython does below it, whose text is unknown."""
    if setting != "%%time":
        return train
    names: dict[str, Any] = {"__name__": "__main__"}
    exec(compile(inspect.getsource(sys.modules[__name__]), TIMED, "exec"), names)
    found: Callable[..., int] = names["train"]
    return found


def train(rank: int, fault: str, victim: int, moment: int, setting: str = "plain") -> int:
    """Average, report, meet, step by step; `victim` goes wrong at step `moment`."""
    if rank == victim and fault == "slow start":
        time.sleep(1.5)
    if rank == victim and fault == "never joined":
        return 0
    dist.init_process_group("gloo", timeout=OWN_TIMEOUT if setting == "own timeout" else None)
    group = dist.new_group() if setting == "subgroup" else dist.group.WORLD
    if setting == "beside a thread":
        threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
    if setting == "in a thread":
        with ThreadPoolExecutor(1) as pool:
            pool.submit(loop, rank, fault, victim, moment, group).result()
    else:
        loop(rank, fault, victim, moment, group)
    dist.destroy_process_group()
    return STEPS


def loop(rank: int, fault: str, victim: int, moment: int, group: Any) -> None:
    act = FAULTS[fault].act if fault else None
    for step in itertools.count() if fault in FROM_OUTSIDE else range(STEPS):
        hit = rank == victim and step == moment
        if hit:
            note_the_time()
        if fault in FROM_OUTSIDE:
            time.sleep(0.5)
        x = torch.ones(3 if hit and fault == "tensor mismatch" else 2)
        if hit and fault == "other dtype":
            x = x.double()
        y = torch.zeros(2)
        if hit and act is not None:
            act(rank)
        if hit and fault == "swapped":
            dist.broadcast(y, 0, group)
            dist.all_reduce(x, group=group)
            continue
        if hit and fault == "swapped alike":
            dist.all_reduce(y, group=group)
            dist.all_reduce(x, group=group)
            continue
        if hit and fault == "extra":
            dist.barrier(group)
        if hit and fault == "extra in a thread":
            threading.Thread(target=extra, args=(group,), name="extra", daemon=True).start()
            time.sleep(0.3)
        if step == moment and fault in LENGTHS:
            send_on(rank, victim, LENGTHS[fault], group)
        if step == moment and fault == "other tag":
            send_on(rank, victim, 2, group, tag=7)
        if step == moment and fault == "other root":
            dist.broadcast(y, (rank or 1) if hit else 0, group)
        if fault == "late for a wait":
            if hit:
                time.sleep(60)
            dist.all_reduce(x, group=group, async_op=True).wait(timedelta(seconds=1))
        if fault == "skipped functional" and not hit:
            funcol.all_reduce(x, "sum", group)
        if fault == "skipped compiled" and not hit:
            compiled(x, group)
        if fault == "caught":
            reduced_or_skipped(x, group, hit)
        elif not (hit and fault == "skipped"):
            dist.all_reduce(x, group=group)
        if hit and fault == "returned early":
            return
        if fault == "swapped alike":
            dist.all_reduce(y, group=group)
        else:
            dist.broadcast(y, 0, group)
        if fault == "groups in different order":
            pair = [dist.new_group(), dist.new_group()]
            for one in pair[::-1] if hit else pair:
                dist.barrier(one)


def reduced_or_skipped(x: torch.Tensor, group: Any, is_bad: bool) -> None:
    """All_reduce a sample, or skip it if it cannot be read."""
    try:
        if is_bad:
            raise ValueError("a bad sample")
        dist.all_reduce(x, group=group)
    except ValueError:
        pass


def compiled(x: torch.Tensor, group: Any) -> torch.Tensor:
    """All_reduce in compiled code."""
    reduce = torch.compile(_reduce, backend="eager", fullgraph=True)
    result: torch.Tensor = reduce(x, group)
    return result


def _reduce(x: torch.Tensor, group: Any) -> torch.Tensor:
    return funcol.all_reduce(x, "sum", group) + 1


def extra(group: Any) -> None:
    dist.barrier(group)


def send_on(rank: int, victim: int, length: int, group: Any, tag: int = 0) -> None:
    """The next rank sends so many numbers to the victim, which expects two, with tag 0."""
    source = (victim + 1) % dist.get_world_size()
    if rank == source:
        dist.send(torch.ones(length), victim, group, tag)
    if rank == victim:
        dist.recv(torch.zeros(2), source, group)


def note_the_time() -> None:
    """Say when the fault happens: in the span buffer, and in the file that NOTE names."""
    with span(MARK):
        pass
    if path := os.environ.get(NOTE):
        with open(path, "w") as file:
            file.write(str(time.time()))


def kill(_: int) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def suspend(_: int) -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def terminate(_: int) -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def fail(_: int) -> None:
    raise ValueError("a bad sample")


def fail_like_a_lost_connection(_: int) -> None:
    raise RuntimeError("Connection closed by peer")  # of a data base, say


def leave(_: int) -> None:
    os._exit(7)


def compute_forever(_: int) -> None:
    sum(itertools.count())


def wait_for_a_lock(_: int) -> None:
    lock = threading.Lock()
    lock.acquire()
    lock.acquire()


def read_in_a_thread_that_dies(_: int) -> None:
    samples: queue.Queue[int] = queue.Queue()
    threading.Thread(target=fail, args=(0,), name="reader").start()
    samples.get()


def close_sockets(_: int) -> None:
    for name in os.listdir("/proc/self/fd"):
        number = int(name)
        try:
            if number > 2 and stat.S_ISSOCK(os.fstat(number).st_mode):
                os.close(number)
        except OSError:
            pass


def fill_the_disk(_: int) -> None:
    with open("/dev/full", "w") as file:
        file.write("a checkpoint")


def flood(_: int) -> None:
    line = "x" * 999 + "\n"
    for _ in range(20_000):
        os.write(1, line.encode())
    raise ValueError("after 20 MB of output")


def run_out_of_memory(_: int) -> None:
    used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + (64 << 20), resource.RLIM_INFINITY))
    torch.zeros(1 << 30)


def leave_the_group(_: int) -> None:
    dist.destroy_process_group()
    time.sleep(60)


def receive_nothing(rank: int) -> None:
    dist.recv(torch.zeros(1), src=(rank + 1) % dist.get_world_size())


SEES = sys.version_info >= (3, 12)  # what ranks catch; see instrumentation/caught.py
LENGTHS = {"message too long": 5, "message too short": 1}
ORDER = ("skipped collective", "different collectives")
FAULTS = {
    "killed": Fault(kill, ("killed",), ""),
    "suspended": Fault(suspend, ("suspended",), ""),
    "terminated": Fault(terminate, ("killed",), ""),
    "raised": Fault(fail, ("raised",), "a bad sample"),
    "raised like a lost connection": Fault(
        fail_like_a_lost_connection, ("raised",), "of a data base"
    ),
    "exited": Fault(leave, ("exited",), ""),
    "endless loop": Fault(compute_forever, ("computing",), "sum(itertools.count())"),
    "lock": Fault(wait_for_a_lock, ("blocked in Python",), "lock.acquire()"),
    "skipped": Fault(None, ORDER, "dist.all_reduce(x, group=group)"),
    "extra": Fault(None, ORDER, "dist.barrier("),
    "swapped": Fault(None, ORDER, "dist.all_reduce(x, group=group)"),
    "tensor mismatch": Fault(None, ("tensor mismatch",), "dist.all_reduce(x"),
    "other dtype": Fault(None, ("tensor mismatch",), "dist.all_reduce(x"),
    "skipped functional": Fault(None, ORDER, "funcol.all_reduce(x"),
    "skipped compiled": Fault(None, ORDER, "def _reduce(x"),
    "caught": Fault(None, ORDER, "caught ValueError: a bad sample" if SEES else "is in a `try`"),
    "other tag": Fault(None, ("unmatched send", "unmatched recv"), "with tag 7"),
    "other root": Fault(None, ("different collectives",), "must name the same src"),
    "swapped alike": Fault(None, (), ""),
    "extra in a thread": Fault(None, ORDER, "in thread 'extra'"),
    "message too long": Fault(None, ("tensor mismatch",), "dist.recv(torch.zeros(2)"),
    "message too short": Fault(None, (), ""),
    "late for a wait": Fault(
        None, ("blocked in Python",), "The timeout of 1 s that Work.wait got at"
    ),
    "thread died": Fault(
        read_in_a_thread_that_dies, ("blocked in Python",), "thread 'reader' of rank"
    ),
    "groups in different order": Fault(None, ("groups in different order",), "dist.barrier(one)"),
    "never joined": Fault(None, ("never joined",), ""),
    "returned early": Fault(None, ("returned early",), "dist.broadcast(y, 0, group)"),
    "left the group": Fault(
        leave_the_group, ("left the group",), "dist.all_reduce(x, group=group)"
    ),
    "recv of nothing": Fault(receive_nothing, ("unmatched recv",), "dist.recv("),
    "closed sockets": Fault(close_sockets, ("raised", "killed"), "dist."),
    "full disk": Fault(fill_the_disk, ("raised",), "file.write"),
    "flood": Fault(flood, ("raised",), "after 20 MB"),
    "slow start": Fault(None, (), ""),
    "forkserver killed": Fault(None, ("forkserver ended",), ""),
    "parent interrupted": Fault(None, (), ""),
    "parent killed": Fault(None, (), ""),
    "memory limit": Fault(run_out_of_memory, ("raised", "killed"), "torch.zeros(1 << 30)"),
}
