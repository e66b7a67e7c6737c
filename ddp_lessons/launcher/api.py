"""`launch`: run a function on several ranks, each a fresh process, and return what came of it.

     cell ── launch(fn) ──► Task: cloudpickle, environment, directory (wire/task.py)
                              │                       parent: here and watchdog.py
                              ▼
              forkserver, warm: torch imported, no CUDA, no threads (worker/preload.py)
                              │ fork x ranks
                              ▼                       child: worker/main.py
          become a fresh process ─► redirect fd 1 and 2 ─► fn(rank, *args), recorded
                              │ three pipes a rank (processes/local.py)
                              ▼
              Run (run.py) ─► printed by rank, explained (diagnosis/), drawn (plots/)

Runs in the parent, in the thread of the cell that calls it.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import linecache
import math
import operator
import os
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Literal, overload

from ddp_lessons.errors import BadLaunch, show_without_frames
from ddp_lessons.instrumentation import recording
from ddp_lessons.launcher import live_panel, memory_check
from ddp_lessons.launcher.in_process import run_here
from ddp_lessons.launcher.live_panel import Panel
from ddp_lessons.launcher.running import RunningRun
from ddp_lessons.launcher.watchdog import AFTER_INTERRUPT, Watchdog
from ddp_lessons.processes import forkserver
from ddp_lessons.processes.base import WorkerGroup
from ddp_lessons.processes.local import LocalWorkerGroup
from ddp_lessons.processes.packing import pack
from ddp_lessons.run import Run
from ddp_lessons.system.interrupts import Interrupts
from ddp_lessons.system.notebook import can_display, in_kernel
from ddp_lessons.text import listed, short_repr, wrapped
from ddp_lessons.wire.task import Task, places

if TYPE_CHECKING:
    import ipyparallel

    from ddp_lessons.diagnosis.verdict import Finding

MOST_RANKS = 256  # six file descriptors a rank: beyond this, ordinary limits on them are reached
START_METHODS = ("forkserver", "spawn")
NOT_RUN = {
    "an async function": inspect.iscoroutinefunction,
    "an async generator function": inspect.isasyncgenfunction,
    "a generator function": inspect.isgeneratorfunction,
}


@overload
def launch(
    fn: Callable[..., Any],
    args: tuple[Any, ...] = (),
    nprocs: int = 2,
    *,
    nnodes: int = 1,
    env: Mapping[str, str] | None = None,
    timeout: float | None = 60.0,
    check: bool = True,
    profile: bool = False,
    notes: bool = False,
    post_mortem: bool = False,
    in_process: bool = False,
    wait: Literal[True] = True,
    start_method: str | None = None,
    cluster: ipyparallel.Client | None = None,
) -> Run: ...
@overload
def launch(
    fn: Callable[..., Any],
    args: tuple[Any, ...] = (),
    nprocs: int = 2,
    *,
    nnodes: int = 1,
    env: Mapping[str, str] | None = None,
    timeout: float | None = 60.0,
    check: bool = True,
    profile: bool = False,
    notes: bool = False,
    post_mortem: bool = False,
    in_process: bool = False,
    wait: Literal[False],
    start_method: str | None = None,
    cluster: ipyparallel.Client | None = None,
) -> RunningRun: ...
def launch(
    fn: Callable[..., Any],
    args: tuple[Any, ...] = (),
    nprocs: int = 2,
    *,
    nnodes: int = 1,
    env: Mapping[str, str] | None = None,
    timeout: float | None = 60.0,
    check: bool = True,
    profile: bool = False,
    notes: bool = False,
    post_mortem: bool = False,
    in_process: bool = False,
    wait: bool = True,
    start_method: str | None = None,
    cluster: ipyparallel.Client | None = None,
) -> Run | RunningRun:
    """Run ``fn(rank, *args)`` on ``nnodes * nprocs`` ranks, print their output, return the record.

    Each rank is a fresh operating-system process that sees the variables torchrun sets: RANK,
    LOCAL_RANK, WORLD_SIZE, LOCAL_WORLD_SIZE, GROUP_RANK, MASTER_ADDR, MASTER_PORT and
    OMP_NUM_THREADS. The function joins the process group itself; `launch` does not do it.
    A rank ends as a script does: when its function has returned, its threads (except daemons) have
    ended and its atexit handlers have run. `timeout` holds until then.

    Parameters
    ----------
    fn : callable
        Called as ``fn(rank, *args)``, as `torch.multiprocessing.spawn` does. It may come from a
        notebook cell: a function, lambda, closure or method.
    args : tuple
        Further arguments, the same for every rank.
    nprocs : int
        Ranks on each machine.
    nnodes : int
        Machines to stand for. All ranks run on this one, numbered as on several:
        ``rank = group_rank * nprocs + local_rank``.
    env : mapping of str to str, optional
        Environment variables on top of the present ones and torchrun's.
    timeout : float or None
        Seconds without progress on any rank after which the run is given up as hung. Progress is a
        line printed, or the end of a span, a collective or a step of an optimizer; a call that
        raises is none. A run that makes progress is never given up; one in which a loop or a call
        shows none of these for longer is.
        None sets no limit. Time in which a rank waits for a processor, as on a machine busy with
        other things, does not count, up to ten times `timeout` in all (Linux). If the ranks' calls
        prove that none can go on, the run ends within seconds in any case.
    check : bool
        Raise an error if a rank fails. False returns the same record instead.
    profile : bool
        Run the function under torch.profiler and add what it saw of communication: when gloo's
        threads (lane "gloo") or NCCL's kernels (lane "nccl") were at work. It costs time and
        memory. If the function uses the profiler itself, these events are missing.
    notes : bool
        Compare the ranks at the end, and print what may be a mistake or meant: weights of DDP
        models or learning rates that differ, and DataLoaders that gave all ranks the same samples
        or drew the same random numbers. It costs time: a checksum of every sample and weight.
    post_mortem : bool
        Where a rank raises, keep the local variables of the learner's functions as text, cut short:
        the error shows those of the innermost, `run.ranks[1].frames` has all. Their `repr` is
        called in the rank.
    in_process : bool
        Call the function as the only rank in this very process, so that `breakpoint()` and `%debug`
        work; nprocs must be 1. The arguments are no copies, nothing is recorded, `timeout` does not
        count, what it prints is not kept, and an exception is raised as it is.
    wait : bool
        False returns at once, a `RunningRun`, while the ranks work and the notebook is free: its
        `wait` prints their output and returns the record, its `stop` ends them. Several may run.
        Not on a cluster.
    start_method : {"forkserver", "spawn"}, optional
        How processes start. forkserver is fast, and the default on Linux; spawn works everywhere.
        `launch` uses spawn if a variable that is only read when a process starts, such as
        TORCH_CPP_LOG_LEVEL or PYTHONHASHSEED, has changed since the forkserver was started.
    cluster : ipyparallel.Client, optional
        Run the ranks on the engines of an ipyparallel cluster, one on each, `nprocs` on each of
        `nnodes` hosts (or on one host that has engines enough). Their variables, directory and
        modules are the engines' own. Needs ``pip install ipyparallel``.

    Returns
    -------
    Run
        Values, output, errors and spans by rank. A RunningRun with ``wait=False``.

    Raises
    ------
    BadLaunch
        The arguments make no sense, or so many ranks do not fit in memory; nothing was started.
    CannotSend
        The function, an argument or a return value cannot be pickled.
    WorkerFailed, WorkerDied, WorkersHung
        A rank raised, its process died, or no rank made progress; only with ``check=True``.
    """
    nprocs, nnodes = whole_number("nprocs", nprocs), whole_number("nnodes", nnodes)
    _refuse_nonsense(fn, args, nprocs, nnodes, env, timeout, start_method)
    if in_process:
        others = {
            "profile": profile,
            "notes": notes,
            "post_mortem": post_mortem,
            "wait": not wait,
            "start_method": start_method,
            "cluster": cluster,
        }
        if asked := [f"{name}=" for name, value in others.items() if value]:
            raise BadLaunch(
                f"in_process=True starts no rank, so {listed(asked)} can do nothing. Leave out one "
                "or the other."
            )
        return run_here(fn, args, env or {}, nprocs * nnodes)
    if cluster is not None and not wait:
        raise BadLaunch(
            "wait=False runs ranks on this machine; on a cluster, launch() waits for them. "
            "Leave out wait= or cluster=."
        )
    packed = pack(fn, env or {}, profile=profile, notes=notes, post_mortem=post_mortem)
    limit = math.inf if timeout is None else float(timeout)
    with _show_briefly(KeyboardInterrupt), Interrupts().counted() as interrupts:
        if cluster is None:
            method = start_method or forkserver.start_method(packed.overrides)
            if notice := memory_check.check(nprocs * nnodes, method):
                print(notice)
            group: WorkerGroup = LocalWorkerGroup(places(nprocs, nnodes), method)
        else:
            group = _on_engines(cluster, nprocs, nnodes, start_method)
        until_ended = _begin(group, packed, fn, args, limit, interrupts, stays=not wait)
        if not wait:
            show = functools.partial(_show, interrupts=interrupts)
            return RunningRun(
                packed.name, nprocs * nnodes, until_ended, show, interrupts, check=check
            )
        run = until_ended()
        _show(run, interrupts)
    if check:
        run.raise_for_failure()
    return run


def _on_engines(cluster: Any, nprocs: int, nnodes: int, start_method: str | None) -> WorkerGroup:
    try:
        import ipyparallel  # noqa: F401
    except ImportError as error:
        raise BadLaunch(
            f"cluster= needs ipyparallel, which cannot be imported: {error}\n"
            "Install it with: pip install ipyparallel"
        ) from None
    from ddp_lessons.cluster.worker_group import ClusterWorkerGroup

    return ClusterWorkerGroup(cluster, nprocs, nnodes, start_method)


def _begin(
    group: WorkerGroup,
    packed: Task,
    fn: Callable[..., Any],
    args: tuple[Any, ...],
    timeout: float,
    interrupts: Interrupts,
    *,
    stays: bool,
) -> Callable[[], Run]:
    """Start the ranks. The function returned watches them until all have ended, and records it.

    An interrupt ends the ranks: while they start it is raised, later the record tells of it.
    """
    held = contextlib.ExitStack()
    held.enter_context(group)
    panel = held.enter_context(Panel(group.workers, stays=stays))
    watch = Watchdog(group, panel.tick, interrupts)

    def stopped() -> Run:
        watch.stop(AFTER_INTERRUPT)
        group.end()
        return _record(packed, group, interrupted=True)

    def until_ended() -> Run:
        with held:
            try:
                hung_after = watch.until_ended(timeout)
            except BaseException:
                run = stopped()
                if interrupts.count:
                    return run
                raise
            group.end()
            return _record(packed, group, hung_after=hung_after)

    try:
        group.start(packed, fn, args, interrupts)
    except BaseException:
        with held:
            run = stopped()
        if interrupts.count:
            _show(run, interrupts)
        raise
    return until_ended


@contextlib.contextmanager
def _show_briefly(kind: type[BaseException]) -> Iterator[None]:
    """Have a notebook show an exception of this kind without the frames of this package."""
    try:
        yield
    except kind as error:
        show_without_frames(error)
        raise


def whole_number(name: str, value: Any) -> int:
    """A number of ranks or hosts, which may be NumPy's or torch's; BadLaunch for anything else."""
    with contextlib.suppress(TypeError):
        if not isinstance(value, bool) and operator.index(value) >= 1:
            return operator.index(value)
    raise BadLaunch(f"{name} is {short_repr(value)}; it must be a whole number, 1 or more.")


def _refuse_nonsense(
    fn: Any, args: Any, nprocs: int, nnodes: int, env: Any, timeout: Any, method: Any
) -> None:
    """Raise BadLaunch for arguments that make no sense, saying what would do."""
    if recording.in_worker():
        raise BadLaunch(
            "launch() was called inside a worker. A rank cannot launch ranks: call it once, "
            "from the notebook or the main script, with all the ranks you need."
        )
    try:
        os.getcwd()
    except FileNotFoundError:
        raise BadLaunch(
            "the working directory, in which the ranks would start, was deleted. "
            "Go to another one: os.chdir(...)."
        ) from None
    if not callable(fn):
        raise BadLaunch(
            f"fn is {short_repr(fn)}, not a function. "
            "Pass the function itself, launch(work), not its result, launch(work(0))."
        )
    if kind := next((kind for kind, is_one in NOT_RUN.items() if is_one(fn)), None):
        raise BadLaunch(
            f"fn is {kind}: calling it runs none of its lines. Launch an ordinary function, which "
            "may call asyncio.run() or go through a generator."
        )
    if not isinstance(args, tuple):
        given = short_repr(args)
        ranks = f" For {given} ranks write nprocs={given}." if isinstance(args, int) else ""
        raise BadLaunch(
            f"args is {given}, not a tuple. For one argument write args=({given},).{ranks}"
        )
    if nprocs * nnodes > MOST_RANKS:
        raise BadLaunch(
            f"{nprocs * nnodes:,} ranks are more than one machine can start; "
            f"the most is {MOST_RANKS}, and 2 to 8 show nearly everything."
        )
    if timeout is not None and (
        not isinstance(timeout, int | float) or isinstance(timeout, bool) or not timeout > 0
    ):
        raise BadLaunch(  # `not >` refuses nan, too
            f"timeout is {short_repr(timeout)}; it must be a number of seconds above 0, or None "
            "for no limit. A run that makes progress is never cut short, so 60 suits long runs, "
            "too."
        )
    if env is not None and not isinstance(env, Mapping):
        raise BadLaunch(
            f"env is {short_repr(env)}, not a dict, such as {{'OMP_NUM_THREADS': '2'}}."
        )
    for name, value in (env or {}).items():
        given = f"env[{short_repr(name)}] is {short_repr(value)}"
        if not isinstance(name, str) or not isinstance(value, str):
            raise BadLaunch(f"{given}; variables are strings: {short_repr(str(value))}.")
        if not name or "=" in name or "\0" in name + value:
            raise BadLaunch(
                f"{given}: the name of a variable cannot be empty or hold '=', "
                "and neither the name nor the value can hold a NUL."
            )
    if method is not None and method not in START_METHODS:
        raise BadLaunch(
            f"start_method is {short_repr(method)}; it must be 'forkserver' or 'spawn'."
        )


def _record(
    packed: Task,
    group: WorkerGroup,
    *,
    hung_after: float | None = None,
    interrupted: bool = False,
) -> Run:
    linecache.checkcache()  # lines that the learner has changed are read anew
    ended = [worker for worker in group.workers if worker.exitcode is not None]
    ranks = [worker.result(packed, hung=hung_after is not None) for worker in ended]
    return Run(
        packed.name,
        ranks,
        begin_ns=group.begin_ns,
        hung_after=hung_after,
        interrupted=interrupted,
        out_of_memory=group.out_of_memory(),
    )


def _show(run: Run, interrupts: Interrupts) -> None:
    # The parent prints, in the cell's own thread and rank by rank: the same text on every run.
    lines = [*run.output_lines(), *map(_noticeable, [*run.warnings, *run.notes])]
    if interrupts.count:  # perhaps when the run had ended
        lines.append("Stopped.")
    if run.interrupted:
        lines += [f"rank {rank.rank} {rank.outcome()}" for rank in run.ranks]
    if lines:
        _print("\n".join(lines))
    if in_kernel() and can_display() and not live_panel.hidden.get():
        _show_displays(run)


def _print(text: str) -> None:
    """Print a text; characters that the encoding of stdout lacks are escaped."""
    try:
        print(text)
    except UnicodeEncodeError as error:
        print(text.encode(error.encoding, "backslashreplace").decode(error.encoding))


def _show_displays(run: Run) -> None:
    """Show what the ranks displayed, rank by rank."""
    for rank in run.ranks:
        if rank.displays:
            from IPython.display import display

            print(f"[rank {rank.rank}] displayed:")
            for one in rank.displays:
                display(one.data, metadata=one.metadata, raw=True)


def _noticeable(finding: Finding) -> str:
    """A finding as text; in a notebook its lines are short and its first word stands out."""
    if not in_kernel():
        return str(finding)
    kind, colon, text = wrapped(str(finding)).partition(":")
    return f"\x1b[1;33m{kind}{colon}\x1b[0m{text}"
