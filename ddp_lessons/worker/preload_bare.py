"""What a forkserver sets up when it starts, whatever else it imports.

Runs in the forkserver process only, and must not import torch: the forkserver from which new
interpreters start needs none, and so is ready in a moment.
"""

import atexit
import contextlib
import os
import signal
import sys
import threading
import warnings
from collections.abc import Iterator

from ddp_lessons.system.reaper import adopt_orphans, end_children_of, listening_paths, remove_after

# The interrupt of a notebook goes to the kernel's whole process group; workers must get it through
# the parent only, which stops them in order.
os.setsid()
# It was started with the interrupt blocked (forkserver.py): drop one that came meanwhile.
signal.signal(signal.SIGINT, signal.SIG_IGN)
signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
signal.signal(signal.SIGINT, signal.default_int_handler)
# Whatever a rank leaves behind becomes this process's, and ends when it ends, at the latest.
adopt_orphans()
atexit.register(end_children_of, os.getpid())
# multiprocessing's own socket lies in a temporary folder, which a killed kernel cannot remove.
for path in listening_paths():
    atexit.register(remove_after, os.getppid(), path)
warnings.filterwarnings("ignore", message="forkserver: waitpid returned unexpected pid")
# multiprocessing closes standard input now and opens the null device: at descriptor 0, if that is
# what it closes. Else every worker would have a descriptor more.
sys.stdin = open(0)

LOOK = 0.2  # seconds between two looks whether the parent lives


@contextlib.contextmanager
def ending_with_parent() -> Iterator[None]:
    """End this process as soon as its parent ends, also in the middle of imports.

    A forkserver looks by itself only when all is imported, which takes seconds on a busy machine.
    """
    parent, over = os.getppid(), threading.Event()

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
