"""A rank's own processes and threads: queues, pools, children, signals, and how all of them end."""

from __future__ import annotations

import asyncio
import atexit
import concurrent.futures
import ctypes
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from tests.parity.features import attempt, feature, joined

PATIENCE = 200.0  # seconds; on a busy machine a process may take a minute to start


def square(x: int) -> int:
    return x * x


def fail(x: int) -> int:
    raise LookupError(f"no {x}")


def fill(tensor: torch.Tensor, value: float) -> None:
    tensor.fill_(value)


def put(queue: Any, value: Any) -> None:
    queue.put(value)


def print_later(text: str) -> None:
    time.sleep(0.3)
    print(text)


def end_with(code: int) -> None:
    sys.exit(code)


def queues() -> tuple[Any, ...]:
    context = mp.get_context("spawn")
    return context.Queue(), context.Queue()


@feature(args=queues)
def queues_between_ranks(rank: int, there: Any, back: Any) -> Any:
    if rank == 0:
        there.put({"tensor": torch.arange(3), "text": "x"})
        got = back.get(timeout=PATIENCE)
        there.put("seen")
        return got
    got = there.get(timeout=PATIENCE)
    back.put(torch.full((2,), 7.0))
    return got, there.get(timeout=PATIENCE)


def primitives() -> tuple[Any, ...]:
    context = mp.get_context("spawn")
    return (
        context.Lock(),
        context.Event(),
        context.Barrier(2),
        context.Value("i", 0),
        context.Array("d", 2),
        context.Semaphore(2),
        context.Pipe(),
        torch.zeros(2).share_memory_(),
    )


@feature(args=primitives)
def primitives_between_ranks(
    rank: int,
    lock: Any,
    event: Any,
    barrier: Any,
    value: Any,
    array: Any,
    semaphore: Any,
    pipe: Any,
    shared: torch.Tensor,
) -> Any:
    with lock:
        value.value += rank + 1
    array[rank] = rank + 0.5
    shared[rank] = 3.0 + rank
    if rank == 0:
        event.set()
    event.wait(PATIENCE)
    semaphore.acquire()
    barrier.wait(PATIENCE)
    pipe[rank].send(f"from {rank}")
    got = pipe[rank].recv()
    barrier.wait(PATIENCE)
    return value.value, list(array), shared.clone(), shared.is_shared(), got


@feature()
def pools(rank: int) -> Any:
    with mp.get_context("fork").Pool(2) as pool:
        forked = pool.map(square, range(4)), attempt(pool.map, fail, [rank])
    with concurrent.futures.ThreadPoolExecutor(2) as threads:
        threaded = list(threads.map(square, range(4)))
    with ThreadPool(2) as threads:
        return forked, threaded, threads.map(square, range(3))


@feature()
def pools_of_other_methods(rank: int) -> Any:
    seen = []
    for method in ("spawn", "forkserver"):
        with mp.get_context(method).Pool(1) as pool:
            seen.append((pool.map(square, range(4)), attempt(pool.map, fail, [rank])))
    context = mp.get_context("fork")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as executor:
        seen.append((executor.submit(square, 5).result(), attempt(executor.submit(fail, 5).result)))
    return seen


@feature()
def tensors_from_children(rank: int) -> Any:
    """A child fills a tensor in shared memory, and sends another through a queue."""
    seen: list[Any] = []
    for method in ("fork", "spawn"):
        context = mp.get_context(method)
        shared, queue = torch.zeros(2).share_memory_(), context.Queue()
        for target, args in ((fill, (shared, 4.0)), (put, (queue, [rank]))):
            child = context.Process(target=target, args=args)
            child.start()
            if target is put:
                seen.append(queue.get(timeout=PATIENCE))
            child.join()
            seen.append(child.exitcode)
        seen.append(shared.clone())
    return seen


@feature()
def torch_spawn_in_a_rank(rank: int) -> Any:
    failed = attempt(mp.spawn, fail, nprocs=1)
    for left in Path(tempfile.gettempdir()).glob("pytorch-errorfile-*"):
        left.unlink(missing_ok=True)  # torch leaves the traceback of a child
    return mp.spawn(square, nprocs=1), failed.splitlines()[0], failed.splitlines()[-1]


@feature()
def children_and_their_exit_codes(rank: int) -> Any:
    codes = []
    for code in (0, 3):
        child = mp.get_context("fork").Process(target=end_with, args=(code,), name="child")
        child.start()
        codes.append((child.name, len(mp.active_children())))
        child.join()
        codes.append((child.exitcode, len(mp.active_children())))
    killed = mp.get_context("fork").Process(target=time.sleep, args=(100,))
    killed.start()
    killed.kill()
    killed.join()
    return codes, killed.exitcode


@feature()
def commands(rank: int) -> Any:
    program = "import os, sys; print(os.environ['RANK'], sys.argv); sys.exit(3)"
    done = subprocess.run(
        [sys.executable, "-c", program, "a"], capture_output=True, text=True, check=False
    )
    refused = attempt(subprocess.run, ["false"], check=True)
    nothing = attempt(subprocess.run, ["/no/such"])
    shell = os.system("echo from a shell; exit 5")
    return (
        done.returncode,
        done.stdout,
        done.stderr,
        refused,
        nothing,
        os.waitstatus_to_exitcode(shell),
    )


@feature()
def fork_by_hand(rank: int) -> Any:
    read, write = os.pipe()
    if (pid := os.fork()) == 0:
        os.write(write, f"child of {rank}".encode())
        os._exit(4)
    _, status = os.waitpid(pid, 0)
    return os.read(read, 100), os.waitstatus_to_exitcode(status)


@joined()
def fork_by_hand_that_goes_on(rank: int) -> Any:
    """A child that computes and raises, while its parent goes on with collectives."""
    if (pid := os.fork()) == 0:
        try:
            torch.ones(3).sum()
            raise LookupError
        except LookupError:
            os._exit(6)
    total = torch.ones(1)
    dist.all_reduce(total)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), total


@feature()
def asyncio_in_a_rank(rank: int) -> Any:
    async def fetch(n: int) -> int:
        await asyncio.sleep(0.001 * n)
        return n

    async def all_of_them() -> list[int]:
        child = await asyncio.create_subprocess_exec("true")
        return [*await asyncio.gather(*map(fetch, range(3))), await child.wait()]

    return asyncio.run(all_of_them())


@feature(ranks=1, alone=True, sample=True)
def exit_handlers(rank: int) -> Any:
    atexit.register(print, "first registered, last run")
    atexit.register(print, "last registered, first run")
    atexit.register(fail, rank)
    threading.Thread(target=print_later, args=("a thread ends",)).start()
    print("returns")
    return rank


@feature(alone=True)
def exit_code(rank: int) -> Any:
    atexit.register(print, "bye")
    sys.exit(5 + rank)


@feature(ranks=1, alone=True)
def exit_code_0(rank: int) -> Any:
    print("done")
    sys.exit(0)


@feature(ranks=1, alone=True)
def exit_with_a_text(rank: int) -> Any:
    sys.exit("no data found")


@feature(alone=True)
def exit_at_once(rank: int) -> Any:
    atexit.register(print, "never")
    print("half a line", end="")
    sys.stdout.flush()
    os._exit(0 if rank else 9)


@feature(ranks=1, alone=True)
def keyboard_interrupt(rank: int) -> Any:
    raise KeyboardInterrupt("by hand")


@feature(ranks=1, alone=True)
def abort(rank: int) -> Any:
    os.abort()


@feature(ranks=1, alone=True)
def killed(rank: int) -> Any:
    print("before")
    os.kill(os.getpid(), signal.SIGKILL)


@feature(ranks=1, alone=True)
def terminated(rank: int) -> Any:
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(60)


@feature(ranks=1, alone=True)
def segmentation_fault(rank: int) -> Any:
    ctypes.string_at(0)


@feature(ranks=1, alone=True)
def raised_with_a_note(rank: int) -> Any:
    atexit.register(print, "bye")
    error = LookupError(f"rank {rank}", {"a": 1})
    error.add_note("a note")
    raise error


@feature()
def raised_in_a_thread(rank: int) -> Any:
    thread = threading.Thread(target=fail, args=(rank,), name="helper")
    thread.start()
    thread.join()
    return rank


@feature()
def hook_for_threads(rank: int) -> Any:
    seen = []
    threading.excepthook, before = (
        lambda args: seen.append(repr(args.exc_value)),
        threading.excepthook,
    )
    thread = threading.Thread(target=fail, args=(rank,))
    thread.start()
    thread.join()
    threading.excepthook = before
    return (
        seen,
        threading.excepthook is threading.__excepthook__,
        sys.excepthook is sys.__excepthook__,
    )


@feature(ranks=1, alone=True)
def daemons(rank: int) -> Any:
    """Daemon threads and processes do not keep a rank."""
    threading.Thread(target=time.sleep, args=(100,), daemon=True).start()
    mp.get_context("fork").Process(target=time.sleep, args=(100,), daemon=True).start()
    print("returns")


@feature(ranks=1, alone=True)
def a_child_that_is_waited_for(rank: int) -> Any:
    child = mp.get_context("fork").Process(target=print_later, args=("a child ends",))
    child.start()
    print("returns")


@feature()
def signals_handled(rank: int) -> Any:
    seen: list[Any] = []
    numbers = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGALRM, signal.SIGHUP)
    before = [signal.signal(n, lambda number, frame: seen.append(number)) for n in numbers]
    for number in numbers:
        os.kill(os.getpid(), number)
    signal.setitimer(signal.ITIMER_REAL, 0.05)
    time.sleep(0.2)
    back = [signal.signal(n, handler) for n, handler in zip(numbers, before, strict=True)]
    return seen, before, len(back)


@feature()
def an_interrupt_that_is_caught(rank: int) -> Any:
    try:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(5)
    except KeyboardInterrupt:
        return "caught"
    return "not raised"


@feature()
def signals_masked_and_awaited(rank: int) -> Any:
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
    os.kill(os.getpid(), signal.SIGUSR1)
    pending = signal.sigpending()
    got = signal.sigwait({signal.SIGUSR1})
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGUSR1})
    return pending, got


@joined()
def an_alarm_in_a_collective(rank: int) -> Any:
    """The handler runs though its rank waits, and a collective that it interrupts goes on."""
    seen: list[int] = []
    signal.signal(signal.SIGALRM, lambda number, frame: seen.append(number))
    signal.setitimer(signal.ITIMER_REAL, 0.05)
    if rank == 0:
        time.sleep(0.3)
    total = torch.ones(1)
    dist.all_reduce(total)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    return seen, total
