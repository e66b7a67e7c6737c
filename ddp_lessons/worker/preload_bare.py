"""Sets up a forkserver process when it starts: its session, interrupts, orphans and sockets.

Runs in both forkservers: the bare one imports only this module, the warm one imports preload.py,
which imports it. It must not import torch, so that the bare forkserver is ready in a moment.
"""

import atexit
import contextlib
import os
import signal
import sys
import threading
import warnings
from collections.abc import Iterator

from ddp_lessons.system import standard_files
from ddp_lessons.system.reaper import (
    adopt_orphans,
    end_children_of,
    has_ended,
    listeners,
    remove_after,
)

# The interrupt of a notebook goes to the kernel's whole process group; workers must get it through
# the parent only, which stops them in order.
os.setsid()
# It was started with the interrupt blocked (forkserver.py): drop one that came meanwhile.
signal.signal(signal.SIGINT, signal.SIG_IGN)
signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
signal.signal(signal.SIGINT, signal.default_int_handler)
# This process adopts the processes that ranks leave behind; they end with it at the latest.
adopt_orphans()
atexit.register(end_children_of, os.getpid())
# multiprocessing's own socket lies in a temporary folder, which a killed kernel cannot remove.
# If it is dead by now, this process is the child of another; it was the one that began to listen.
parent = os.getppid()
for path, listened in listeners():
    parent = listened if listened and has_ended(listened) else parent
    atexit.register(remove_after, parent, path)
warnings.filterwarnings("ignore", message="forkserver: waitpid returned unexpected pid")
standard_files.hold()
# multiprocessing closes sys.stdin next and opens the null device, which gets descriptor 0 only if
# that is what it closed. Else every worker would have one descriptor more.
sys.stdin = open(0)

LOOK = 0.2  # seconds between two checks whether the parent lives


@contextlib.contextmanager
def ending_with_parent() -> Iterator[None]:
    """End this process as soon as its parent ends, also in the middle of imports.

    multiprocessing's forkserver checks only after its imports, which take seconds on a busy
    machine.
    """
    over = threading.Event()

    def watch() -> None:
        while not over.wait(LOOK):
            if os.getppid() != parent:
                atexit._run_exitfuncs()
                os._exit(1)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
