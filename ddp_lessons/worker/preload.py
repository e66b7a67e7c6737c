"""Imports torch in the warm forkserver once, so that no forked worker has to.

Runs in the forkserver process only. It must leave no extra thread, no CUDA context and no drawn
random number behind, because every worker is a copy of this process.
"""

import atexit
import contextlib
import gc
import os

from ddp_lessons.worker.preload_bare import ending_with_parent

gc.disable()  # imports leave no garbage; looking for it takes a sixth of the time

# NumPy's OpenBLAS starts its threads while it is imported; a thread does not survive a fork.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
# Lets a worker count GPUs without a CUDA context (PyTorch, notes on CUDA semantics).
os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")

with ending_with_parent():
    import numpy  # noqa: F401
    import torch

    from ddp_lessons.worker.main import remove_unused_cache

    # The first DistributedDataParallel() imports torch._dynamo, which would take each worker 1.3 s
    # and 113 MB. There is no public name that loads it.
    _had_cache = "TORCHINDUCTOR_CACHE_DIR" in os.environ
    if not _had_cache:
        atexit.register(remove_unused_cache)  # the parent may end meanwhile
    import torch._dynamo
    import torch.distributed
    import torch.nn.parallel
    import torch.optim
    import torch.profiler
    import torch.utils.data.distributed  # noqa: F401

    import ddp_lessons.worker.spare  # noqa: F401
    from ddp_lessons import data
    from ddp_lessons.instrumentation.install import wrap_torch
    from ddp_lessons.worker import huge_pages

    wrap_torch()
    with contextlib.suppress(Exception):  # scikit-learn, which only lessons need, may be broken
        data.digits()

if not _had_cache:
    remove_unused_cache()
    atexit.unregister(remove_unused_cache)  # the ranks' folders are the ranks'

# Hardly any object is garbage now; scanning them would copy shared pages in each worker. To collect
# first would take a tenth of the time of all imports and free no memory to speak of.
gc.freeze()
gc.enable()
huge_pages.await_request()
