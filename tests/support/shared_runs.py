"""Judges several answers of one check, whose runs share processes: a launch for all, not for each.

Every answer's check runs as it does in a notebook, up to where it asks for ranks. When all ask,
one launch calls their functions on its ranks, one after the other, each in a process group of its
own; and each check goes on with the `Run` that it would have had. That holds for functions that
return on all ranks and leave a rank as it was. Any other's run is made anew, alone.

`judged` and what it calls run in the parent, `_one_after_another` in the ranks.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import cloudpickle
import greenlet  # type: ignore[import-untyped]
import torch.distributed as dist

from ddp_lessons import Run, Span, launch, span
from ddp_lessons.exercises.framework import Exercise, Feedback, run_ranks
from ddp_lessons.launcher.live_panel import hidden
from ddp_lessons.processes.packing import name_of
from ddp_lessons.results import RankResult
from ddp_lessons.wire.pickling import dumps

PLACE = "place of a shared run"  # the span around one of the functions
TIMEOUT = 5.0  # seconds without progress; whoever causes it is run again, alone


class _Asked(NamedTuple):
    """The ranks that a check asks for: the arguments of `run_ranks`."""

    fn: Callable[..., Any]
    args: tuple[Any, ...] = ()
    nprocs: int = 2
    nnodes: int = 1
    check: bool = True


class _Packed(NamedTuple):
    """The same for a rank: a pickle, as functions that share one share their globals, too."""

    pickle: bytes
    name: str
    nprocs: int
    nnodes: int
    check: bool


def judged(check: Exercise, answers: Sequence[Any]) -> list[Feedback]:
    """What `check` says of each answer, in the order of the answers."""
    asking: dict[greenlet.greenlet, _Asked] = {}
    found: dict[greenlet.greenlet, Feedback] = {}
    hub = greenlet.getcurrent()

    def go_on(judging: greenlet.greenlet, how: Callable[..., Any], *given: Any) -> None:
        """Let a check run until it asks for ranks or ends."""
        said = how(*given)
        (found if judging.dead else asking)[judging] = said

    with _asking_instead(check, lambda *args, **how: hub.switch(_Asked(*args, **how))):
        all_judging = [greenlet.greenlet(check) for _ in answers]
        for judging, answer in zip(all_judging, answers, strict=True):
            go_on(judging, judging.switch, answer)
        while asking:
            asked, asking = asking, {}
            runs = _runs(list(asked.values()))
            for judging, run in zip(asked, runs, strict=True):
                how = judging.throw if isinstance(run, BaseException) else judging.switch
                go_on(judging, how, run)
    return [found[judging] for judging in all_judging]


@contextlib.contextmanager
def _asking_instead(check: Exercise, ask: Callable[..., Any]) -> Iterator[None]:
    """Have the module of the check call `ask` where it calls `run_ranks`."""
    names = vars(sys.modules[check.__module__])
    if names.get("run_ranks") is not run_ranks:
        yield
        return
    names["run_ranks"] = ask
    try:
        yield
    finally:
        names["run_ranks"] = run_ranks


def _runs(asked: Sequence[_Asked]) -> list[Run | BaseException]:
    """The run of each, or what it raised; those on equally many ranks share one."""
    found: dict[_Packed, Run | BaseException] = {}
    packed = [_pack(one) for one in asked]
    ranks: dict[tuple[int, int], list[_Packed]] = {}
    for pack in dict.fromkeys(packed):  # without an answer in it, several ask for the same
        ranks.setdefault((pack.nprocs, pack.nnodes), []).append(pack)
    with tempfile.TemporaryDirectory() as copies:
        folders = [Path(arg) for one in asked for arg in one.args if _is_folder(arg)]
        kept = {folder: Path(copies, str(n)) for n, folder in enumerate(dict.fromkeys(folders))}
        for folder, copy in kept.items():
            shutil.copytree(folder, copy)
        for left in ranks.values():
            while len(left) > 1:
                shared = _share(left)
                found |= {p: run for p, run in zip(left, shared, strict=False) if run is not None}
                left = left[len(shared) :]
        for pack, one in zip(packed, asked, strict=True):
            if pack not in found:
                for folder in filter(_is_folder, one.args):
                    shutil.rmtree(folder)  # what the first try left there
                    shutil.copytree(kept[Path(folder)], folder)
                found[pack] = _alone(one)
    return [found[pack] for pack in packed]


def _is_folder(arg: Any) -> bool:
    return isinstance(arg, str | Path) and os.path.isdir(arg)


def _alone(asked: _Asked) -> Run | BaseException:
    try:
        return run_ranks(*asked)
    except BaseException as error:
        return error


def _share(asked: Sequence[_Packed]) -> list[Run | None]:
    """A run for each that came to its end, in order, and None for one that needs its own."""
    first, begin = asked[0], time.perf_counter_ns()
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(None):
        token = hidden.set(True)
        try:
            run = launch(
                _one_after_another,
                ([one.pickle for one in asked], folder),
                first.nprocs,
                nnodes=first.nnodes,
                timeout=TIMEOUT,
                check=False,
            )
        finally:
            hidden.reset(token)
        found: list[Run | None] = []
        for place, one in enumerate(asked):
            files = [_file(folder, place, rank.rank) for rank in run.ranks]
            if not all(file.exists() for file in files):
                return [*found, None]  # here it ended
            parts = [_part(r, place, f) for r, f in zip(run.ranks, files, strict=True)]
            ranks = [part for part in parts if part is not None]
            whole = len(ranks) == run.world_size
            found.append(Run(one.name, ranks, begin_ns=begin) if whole else None)
    return found


def _file(folder: str, place: int, rank: int) -> Path:
    """Where a rank writes what the function of a place returned; empty if that does not count."""
    return Path(folder, f"{place} of {rank}")


def _pack(asked: _Asked) -> _Packed:
    try:
        pickled = cloudpickle.dumps((asked.fn, asked.args))
    except Exception:  # `launch` says why, when it runs alone
        pickled = repr(id(asked)).encode()
    return _Packed(pickled, name_of(asked.fn), *asked[2:])


def _part(rank: RankResult, place: int, file: Path) -> RankResult | None:
    """What a rank's result would have been with the function of one place only."""
    returned = file.read_bytes()
    around = next((s for s in rank.spans if s.name == f"{PLACE} {place}"), None)
    if not returned or rank.dropped or around is None or around.t1_ns is None:
        return None
    _, _, after = rank.output.partition(_line(place))
    output, ended, _ = after.partition(_line(place + 1))
    inside = _within(rank.spans, around.t0_ns, around.t1_ns)
    if not ended:
        return None
    return RankResult(
        rank=rank.rank,
        status="returned",
        value=pickle.loads(returned),
        output=output,
        error=None,
        exitcode=0,
        spans=(around._replace(lane="process", kind="mark", name="life"), *inside),
        began_ns=around.t0_ns,
        started_ns=around.t0_ns,
        ended_ns=around.t1_ns,
        group_rank=rank.group_rank,
    )


def _within(spans: Sequence[Span], begin: int, end: int) -> Iterator[Span]:
    """The spans that begin within a place; what goes on behind its end never ended."""
    for one in spans:
        if begin <= one.t0_ns < end and not one.name.startswith(PLACE):
            goes_on = one.t1_ns is None or one.t1_ns > end
            yield one._replace(t1_ns=None) if goes_on else one


def _line(place: int) -> str:
    """What a rank writes before the output of a place."""
    return f"[{PLACE} {place} begins]\n"


def _one_after_another(rank: int, places: Sequence[bytes], folder: str) -> None:
    environment, directory = dict(os.environ), os.getcwd()
    for place, pickled in enumerate(places):
        _await_all(folder, place, rank)
        _write(_line(place))
        threads = set(threading.enumerate())
        with span(f"{PLACE} {place}"):
            returned = _returned(pickled, rank)
        if dist.is_initialized():  # it failed, or left that to the process's end
            returned = b""
            dist.destroy_process_group()
        os.environ.clear()
        os.environ.update(environment)
        os.chdir(directory)
        more = set(threading.enumerate()) - threads
        _file(folder, place, rank).write_bytes(b"" if more else returned)
    _write(_line(len(places)))


def _await_all(folder: str, place: int, rank: int) -> None:
    """Begin when all ranks do, as the ranks of a launch."""
    here = [Path(folder, f"{n} comes to {place}") for n in range(int(os.environ["WORLD_SIZE"]))]
    here[rank].touch()
    while not all(file.exists() for file in here):
        time.sleep(0.002)


def _returned(pickled: bytes, rank: int) -> bytes:
    """The pickle of what a function returned; b"" if it has to run alone."""
    try:
        fn, args = pickle.loads(pickled)
        return dumps(fn(rank, *args))
    except BaseException:
        return b""


def _write(line: str) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os.write(1, line.encode())
