"""torchrun as a command whose agents have imported torch already: forks of one warm process.

An agent needs torch, for which a new Python takes a second and a half; its ranks are new Pythons as
ever. `command` gives what stands for ``python -m torch.distributed.run``: a program that sends its
arguments, variables, directory and standard streams to the warm process, which forks the agent. The
program hands on SIGTERM to the agent and ends as that ends.

`serve` runs in the warm process, `_become_agent` in its forks, `ask` in the program.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from typing import Any

MOST = 1 << 20  # bytes of what a program sends
LOST = 137  # exit code of an agent that was killed


@contextlib.contextmanager
def command() -> Iterator[tuple[str, ...]]:
    """The command; it works within the block."""
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:  # a socket's name must be short
        address = os.path.join(folder, "warm")
        warm = subprocess.Popen(
            [sys.executable, __file__, "serve", address],
            env={**os.environ, "OPENBLAS_NUM_THREADS": "1"},  # no thread survives a fork
            stdout=subprocess.PIPE,
        )
        with warm:
            assert warm.stdout is not None
            assert warm.stdout.readline() == b"ready\n"
            yield (sys.executable, "-I", "-S", __file__, "ask", address)
            warm.terminate()


def serve(address: str) -> None:
    """Fork an agent for each program that asks."""
    from torch.distributed import run

    with socket.socket(socket.AF_UNIX) as server:
        server.bind(address)
        server.listen()
        print("ready", flush=True)
        while True:
            program, _ = server.accept()
            _forget_ended()
            with program:
                if os.fork() == 0:
                    server.close()
                    _become_agent(program, run)


def _forget_ended() -> None:
    """Take note of the agents that have ended, so that the system forgets them."""
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def _become_agent(program: socket.socket, run: Any) -> None:
    """Run torchrun's main function as the program would, and report the exit code."""
    sent, streams, _, _ = socket.recv_fds(program, MOST, 3)
    while not sent.endswith(b"\n"):
        sent += program.recv(MOST)
    arguments, variables, directory = json.loads(sent)
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    os.environ.clear()
    os.environ.update(variables)
    os.chdir(directory)
    sys.argv = [run.__file__, *arguments]
    program.sendall(f"{os.getpid()}\n".encode())
    code = 0
    try:
        run.main()
    except SystemExit as left:
        code = left.code if isinstance(left.code, int) else int(left.code is not None)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        code = 1
    program.sendall(f"{code}\n".encode())
    program.detach()  # it closes with the process
    sys.exit(code)


def ask(address: str, arguments: list[str]) -> int:
    """Have an agent run; the exit code."""
    with socket.socket(socket.AF_UNIX) as warm:
        warm.connect(address)
        what = json.dumps([arguments, dict(os.environ), os.getcwd()]).encode() + b"\n"
        warm.sendall(what[socket.send_fds(warm, [what], [0, 1, 2]) :])
        for stream in (0, 1, 2):
            os.close(stream)  # they are the agent's now
        with warm.makefile() as answers:
            agent = int(answers.readline())
            signal.signal(signal.SIGTERM, lambda *_: os.kill(agent, signal.SIGTERM))
            code = answers.readline()
            answers.read()  # until it has ended
    return int(code) if code else LOST


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        serve(sys.argv[2])
    else:
        sys.exit(ask(sys.argv[2], sys.argv[3:]))
