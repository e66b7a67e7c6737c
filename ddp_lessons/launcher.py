"""`launch`: run a function on several ranks, each a fresh process, and return what came of it.

     cell ── launch(fn) ──► Task: cloudpickle, environment, directory (task.py)
                              │                       parent: this module, watch.py
                              ▼
              forkserver, warm: torch imported, no CUDA, no threads (preload.py)
                              │ fork x ranks
                              ▼                       child: worker.py
          become a fresh process ─► redirect fd 1 and 2 ─► fn(rank, *args), recorded
                              │ three pipes a rank (processes.py, messages.py)
                              ▼
              Run (results.py) ─► printed by rank, explained (diagnosis.py), drawn (plots/)

Runs in the parent, in the thread of the cell.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from ddp_lessons import capacity, recording, stacks, task, warm
from ddp_lessons.crew import Crew, Local
from ddp_lessons.errors import BadLaunch, show_without_frames
from ddp_lessons.interrupts import deferred_interrupt
from ddp_lessons.live import Panel
from ddp_lessons.messages import ErrorRecord, Raised, Returned, Span, Unsendable
from ddp_lessons.results import RankResult, Run, Status
from ddp_lessons.watch import AFTER_INTERRUPT, Watch
from ddp_lessons.workers import Worker

if TYPE_CHECKING:
    import ipyparallel

MOST_RANKS = 256  # six file descriptors a rank: beyond this, ordinary limits on them are reached
START_METHODS = ("forkserver", "spawn")


def launch(
    fn: Callable[..., Any],
    args: tuple[Any, ...] = (),
    nprocs: int = 2,
    *,
    nnodes: int = 1,
    env: Mapping[str, str] | None = None,
    timeout: float = 60.0,
    check: bool = True,
    profile: bool = False,
    start_method: str | None = None,
    cluster: ipyparallel.Client | None = None,
) -> Run:
    """Run ``fn(rank, *args)`` on ``nnodes * nprocs`` ranks, print their output, return the record.

    Each rank is a fresh operating-system process that sees the variables torchrun sets: RANK,
    LOCAL_RANK, WORLD_SIZE, LOCAL_WORLD_SIZE, GROUP_RANK, MASTER_ADDR, MASTER_PORT and
    OMP_NUM_THREADS. The function joins the process group itself; nothing does it in secret.

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
    timeout : float
        Seconds without progress on any rank (a line printed, a span, a collective or a step of an
        optimizer finished) after which the run is given up as hung. A run that moves is never cut
        short.
    check : bool
        Raise an error if a rank fails. False returns the same record instead.
    profile : bool
        Run the function under torch.profiler and add what it saw of communication: when gloo's
        threads (lane "gloo") or NCCL's kernels (lane "nccl") were at work. It costs time and
        memory. If the function uses the profiler itself, that one counts, and this is missing.
    start_method : {"forkserver", "spawn"}, optional
        How processes start. forkserver is fast, and the default on Linux; spawn works everywhere,
        and is taken where a variable that is only read when a process starts, such as
        TORCH_CPP_LOG_LEVEL or PYTHONHASHSEED, has changed since the forkserver was started.
    cluster : ipyparallel.Client, optional
        Run the ranks on the engines of an ipyparallel cluster, one on each, `nprocs` on each of
        `nnodes` hosts (or on one host that has engines enough). Their variables, directory and
        modules are the engines' own. Needs ``pip install ipyparallel``.

    Returns
    -------
    Run
        Values, output, errors and spans by rank.

    Raises
    ------
    BadLaunch
        The arguments make no sense, or memory does not carry so many ranks; nothing was started.
    CannotSend
        The function, an argument or a return value cannot be pickled.
    WorkerFailed, WorkerDied, WorkersHung
        A rank raised, its process died, or no rank made progress; only with ``check=True``.
    """
    _refuse_nonsense(fn, args, nprocs, nnodes, env, timeout, start_method)
    packed = task.pack(fn, env or {}, profile)
    if cluster is None:
        method = start_method or warm.start_method(packed.overrides)
        if notice := capacity.check(nprocs * nnodes, method):
            print(notice)
        crew: Crew = Local(task.places(nprocs, nnodes), method)
    else:
        crew = _on_engines(cluster, nprocs, nnodes, start_method)
    run = _carry_out(crew, packed, fn, args, float(timeout))
    if check:
        run.raise_for_failure()
    return run


def _on_engines(cluster: Any, nprocs: int, nnodes: int, start_method: str | None) -> Crew:
    try:
        import ipyparallel  # noqa: F401
    except ImportError as error:
        raise BadLaunch(
            f"cluster= needs ipyparallel, which cannot be imported: {error}\n"
            "Install it with: pip install ipyparallel"
        ) from None
    from ddp_lessons.cluster import OnEngines

    return OnEngines(cluster, nprocs, nnodes, start_method)


def _carry_out(
    crew: Crew, packed: task.Task, fn: Callable[..., Any], args: tuple[Any, ...], timeout: float
) -> Run:
    hung_after: float | None = None
    with crew, Panel(crew.workers) as panel:
        watch = Watch(crew, panel.tick)
        try:
            crew.start(packed, fn, args)
            hung_after = watch.until_ended(timeout)
        except BaseException as error:
            with deferred_interrupt():
                watch.stop(AFTER_INTERRUPT)
                crew.end()
            run = _record(packed, crew, interrupted=True)
            if isinstance(error, KeyboardInterrupt):
                _show_interrupted(run)
                show_without_frames(error)
            raise
        crew.end()
        run = _record(packed, crew, hung_after=hung_after)
    _show_output(run)
    return run


def _refuse_nonsense(
    fn: Any, args: Any, nprocs: Any, nnodes: Any, env: Any, timeout: Any, method: Any
) -> None:
    """Raise BadLaunch for arguments that make no sense, saying what would do."""
    if recording.in_worker():
        raise BadLaunch(
            "launch() was called inside a worker. A rank cannot launch ranks: call it once, "
            "from the notebook or the main script, with all the ranks you need."
        )
    if not callable(fn):
        raise BadLaunch(
            f"fn is {fn!r}, not a function. "
            "Pass the function itself, launch(work), not its result, launch(work(0))."
        )
    if not isinstance(args, tuple):
        ranks = f" For {args} ranks write nprocs={args}." if isinstance(args, int) else ""
        raise BadLaunch(
            f"args is {args!r}, not a tuple. For one argument write args=({args!r},).{ranks}"
        )
    for name, value in (("nprocs", nprocs), ("nnodes", nnodes)):
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise BadLaunch(f"{name} is {value!r}; it must be a whole number, 1 or more.")
    if nprocs * nnodes > MOST_RANKS:
        raise BadLaunch(
            f"{nprocs * nnodes:,} ranks are more than one machine can start; "
            f"the most is {MOST_RANKS}, and 2 to 8 show nearly everything."
        )
    if not isinstance(timeout, int | float) or isinstance(timeout, bool) or not timeout > 0:
        raise BadLaunch(  # `not >` refuses nan, too
            f"timeout is {timeout!r}; it must be a number of seconds above 0. "
            "A run that makes progress is never cut short, so 60 suits long runs, too."
        )
    if env is not None and not isinstance(env, Mapping):
        raise BadLaunch(f"env is {env!r}, not a dict, such as {{'OMP_NUM_THREADS': '2'}}.")
    for name, value in (env or {}).items():
        if not isinstance(name, str) or not isinstance(value, str):
            raise BadLaunch(f"env[{name!r}] is {value!r}; variables are strings: {str(value)!r}.")
    if method is not None and method not in START_METHODS:
        raise BadLaunch(f"start_method is {method!r}; it must be 'forkserver' or 'spawn'.")


def _record(
    packed: task.Task,
    crew: Crew,
    *,
    hung_after: float | None = None,
    interrupted: bool = False,
) -> Run:
    ranks = [_result(worker, packed) for worker in crew.workers if worker.exitcode is not None]
    return Run(
        packed.name,
        ranks,
        begin_ns=crew.begin_ns,
        hung_after=hung_after,
        interrupted=interrupted,
        out_of_memory=crew.out_of_memory(),
    )


def _result(worker: Worker, packed: task.Task) -> RankResult:
    assert worker.exitcode is not None
    assert worker.ended_ns is not None
    status: Status = "stopped" if worker.stopped else "died"
    value, error, exception = None, None, None
    match worker.outcome:
        case Returned(_, data):
            status, value, error = _loaded(data)
        case Raised(_, record, _, data):
            status = "raised" if not worker.stopped else "stopped"
            error, exception = record, _exception(data)
        case Unsendable(_, type_name, reason):
            status, error = "unsendable", ErrorRecord(type_name, reason, ())
        case None:
            error = worker.lost
    return RankResult(
        rank=worker.rank,
        status=status,
        value=value,
        output=worker.output.text(),
        error=error,
        exception=exception,
        exitcode=worker.exitcode,
        spans=(*_life(worker, packed.name), *worker.spans()),
        began_ns=worker.began_ns,
        started_ns=worker.started_ns,
        ended_ns=worker.ended_ns,
        stack=stacks.parse(worker.stack_text, packed.home),
        activity=worker.activity,
        dropped=worker.dropped(),
        group_rank=worker.place.group_rank,
        host=worker.host,
    )


def _loaded(data: bytes) -> tuple[Status, Any, ErrorRecord | None]:
    try:
        return "returned", pickle.loads(data), None
    except Exception as error:  # whatever a learner's object raises while it is rebuilt
        return "unsendable", None, ErrorRecord("unknown", repr(error), ())


def _exception(data: bytes | None) -> BaseException | None:
    try:
        exception = pickle.loads(data) if data else None
    except Exception:  # its class may not be importable here; its text travelled separately
        return None
    return exception if isinstance(exception, BaseException) else None


def _life(worker: Worker, name: str) -> list[Span]:
    """Two spans of lane "process": until the function was called, and from then to the end."""
    called = worker.started_ns or worker.ended_ns
    spans = [Span(worker.rank, "process", "mark", "start-up", worker.began_ns, called)]
    if worker.started_ns is not None:
        spans.append(Span(worker.rank, "process", "mark", name, worker.started_ns, worker.ended_ns))
    return spans


def _show_output(run: Run) -> None:
    # The parent prints, in the cell's own thread and rank by rank: the same text on every run.
    lines = [*run.output_lines(), *run.warnings]
    if lines:
        print("\n".join(lines))


def _show_interrupted(run: Run) -> None:
    _show_output(run)
    print("\n".join(["Stopped.", *(f"rank {r.rank} {r.outcome()}" for r in run.ranks)]))
