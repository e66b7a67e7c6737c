"""What is said of a rank that failed or died; real processes, without a GPU."""

from __future__ import annotations

import os
import sys

import cloudpickle

from ddp_lessons import launch

cloudpickle.register_pickle_by_value(sys.modules[__name__])

# What a kernel, NCCL's watchdog and C++'s runtime wrote on an H100 (torch 2.11), shortened.
OF_A_GPU = """\
/src/native/cuda/IndexKernel.cu:111: operator(): block: [0,0,0], thread: [0,0,0] Assertion \
`index < sizes[i] && "index out of bounds"` failed.
/src/native/cuda/IndexKernel.cu:111: operator(): block: [0,0,0], thread: [1,0,0] Assertion \
`index < sizes[i] && "index out of bounds"` failed.
[rank0]: Process group watchdog thread terminated with exception: CUDA error: device-side \
assert triggered
Search for `cudaErrorAssert' in the documentation for more information.

Exception raised from query at /src/c10/cuda/CUDAEvent.h:111 (most recent call first):
frame #0: c10::Error::Error(c10::SourceLocation) + 0x9d (0x7fb6 in libc10.so)
frame #1: <unknown function> + 0xc114 (0x7fb6 in libc10_cuda.so)
frame #2: <unknown function> + 0x129ecc (0x7fb6 in libc.so.6)

"""


def writes_and_aborts(rank: int, text: str) -> None:
    os.write(2, text.encode())
    os.abort()


def test_an_error_of_the_gpu_that_ends_the_process_is_told_without_cpp_stacks() -> None:
    text = launch(writes_and_aborts, (OF_A_GPU,), nprocs=1, check=False).explain()
    assert "NCCL's watchdog ended the process" in text
    assert "index out of bounds" in text
    assert "device-side assert" in text
    assert "CUDA_LAUNCH_BLOCKING" in text
    assert text.count("Assertion") == 1
    assert "frame #" not in text


def test_a_cpp_stack_hides_nothing_of_what_was_said_before_it() -> None:
    said = "terminate called after throwing an instance of 'Oops'\n"
    frames = "".join(f"frame #{n}: <unknown function> + 0x{n}\n" for n in range(20))
    text = launch(writes_and_aborts, (said + frames,), nprocs=1, check=False).explain()
    assert "instance of 'Oops'" in text
    assert "frame #" not in text
    assert "CUDA" not in text


def test_an_error_of_the_gpu_that_python_raises_is_told_with_what_the_kernel_said() -> None:
    def work(rank: int) -> None:
        os.write(2, OF_A_GPU.encode())
        raise RuntimeError("CUDA error: device-side assert triggered")

    text = launch(work, nprocs=1, check=False).explain()
    assert 'raise RuntimeError("CUDA error' in text
    assert "index out of bounds" in text
    assert "CUDA_LAUNCH_BLOCKING" in text
