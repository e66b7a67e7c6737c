"""What the forkserver imports once, so that no forked worker has to.

Runs in the forkserver process only. It must leave no extra thread, no CUDA context and no drawn
random number behind, because every worker is a copy of this process.
"""

import atexit
import contextlib
import gc
import os
import signal
import sys
import warnings

from ddp_lessons.orphans import (
    adopt_orphans,
    end_children_of,
    listening_paths,
    remove_with_folder,
)

# The interrupt of a notebook goes to the kernel's whole process group; workers must get it through
# the parent only, which stops them in order.
os.setsid()
# It was started with the interrupt blocked (warm.py): drop one that came meanwhile.
signal.signal(signal.SIGINT, signal.SIG_IGN)
signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
signal.signal(signal.SIGINT, signal.default_int_handler)
# Whatever a rank leaves behind becomes this process's, and ends when it ends, at the latest.
adopt_orphans()
atexit.register(end_children_of, os.getpid())
# multiprocessing's own socket lies in a temporary folder, which a killed kernel cannot remove.
for path in listening_paths():
    atexit.register(remove_with_folder, path)
warnings.filterwarnings("ignore", message="forkserver: waitpid returned unexpected pid")
# multiprocessing closes standard input now and opens the null device: at descriptor 0, if that is
# what it closes. Else every worker would have a descriptor more.
sys.stdin = open(0)
# NumPy's OpenBLAS starts its threads while it is imported; a thread does not survive a fork.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
# Lets a worker count GPUs without a CUDA context (PyTorch, notes on CUDA semantics).
os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")

import numpy  # noqa: E402, F401
import torch  # noqa: E402

# The first DistributedDataParallel() imports torch._dynamo: 1.3 s and 113 MB a rank if every worker
# did it for itself. There is no public name that loads it.
_had_cache = "TORCHINDUCTOR_CACHE_DIR" in os.environ
import torch._dynamo  # noqa: E402
import torch.distributed  # noqa: E402
import torch.nn.parallel  # noqa: E402
import torch.optim  # noqa: E402
import torch.profiler  # noqa: E402
import torch.utils.data.distributed  # noqa: E402, F401

import ddp_lessons.worker  # noqa: E402
from ddp_lessons import collectives, data  # noqa: E402

collectives.wrap_torch()
with contextlib.suppress(ModuleNotFoundError):  # of scikit-learn, which only lessons need
    data.digits()

if not _had_cache:
    ddp_lessons.worker.remove_unused_cache()

# What lives now is never garbage: collecting it would copy shared pages in every worker.
gc.collect()
gc.freeze()
