"""recommend_backend, and the refusal of NCCL on a shared GPU before NCCL starts.

The rules are pure functions of counts, and tested as such. Their use is tested in real workers in
which `torch.cuda.device_count` is patched to report GPUs; tests/end_to_end/test_gpu.py tests the
rest on a GPU.
"""

from __future__ import annotations

import os
import subprocess
import sys
from itertools import product
from typing import Any

import cloudpickle
import numpy as np
import pytest
import torch
import torch.distributed as dist

from ddp_lessons import BadLaunch, Run, launch, recommend_backend
from ddp_lessons.instrumentation.gpu_sharing import on_this_machine, shared_gpu, wants_nccl
from ddp_lessons.launcher.backends import Machine, choose

cloudpickle.register_pickle_by_value(sys.modules[__name__])


def full(gpus: int) -> Machine:
    return Machine(gpus, nccl=True, gloo=True, for_gpus=True)


@pytest.mark.parametrize(
    ("gpus", "nprocs", "backend"),
    [
        (0, 1, "gloo"),
        (0, 4, "gloo"),
        (1, 1, "nccl"),
        (1, 4, "gloo"),
        (2, 1, "nccl"),
        (2, 2, "nccl"),
        (2, 3, "gloo"),
        (8, 8, "nccl"),
        (8, 9, "gloo"),
    ],
)
def test_nccl_where_each_rank_can_have_a_gpu(gpus: int, nprocs: int, backend: str) -> None:
    chosen, why = choose(nprocs, full(gpus))
    assert chosen == backend
    assert why.startswith(f"{backend}: {nprocs} rank")
    assert (f"{gpus} GPU" if gpus else "no GPU") in why
    assert len(why.splitlines()) == 2
    assert max(map(len, why.splitlines())) < 130


def test_what_is_chosen_can_run() -> None:
    builds = list(product((False, True), repeat=3))
    for gpus, nprocs, (nccl, gloo, for_gpus) in product(range(5), range(1, 6), builds):
        machine = Machine(gpus if for_gpus else 0, nccl and for_gpus, gloo, for_gpus)
        nccl_fits = machine.nccl and machine.gpus >= nprocs
        if gloo or nccl_fits:
            assert choose(nprocs, machine)[0] == ("nccl" if nccl_fits else "gloo")
            assert choose(nprocs, machine) == choose(nprocs, machine)
        else:
            with pytest.raises(BadLaunch, match="no backend fits"):
                choose(nprocs, machine)


@pytest.mark.parametrize(
    ("nprocs", "machine", "facts"),
    [
        (
            4,
            full(1),
            ["4 ranks a GPU", "refuses two ranks on one GPU", "through the CPU"],
        ),
        (3, full(2), ["up to 2 ranks a GPU"]),
        (4, full(0), ["no GPU", "only between GPUs", "has NCCL and gloo"]),
        (2, Machine(0, False, True, False), ["for CPUs", "gloo but not NCCL", "not see a GPU"]),
        (2, Machine(2, False, True, True), ["Without NCCL", "has gloo"]),
        (2, Machine(2, True, False, True), ["a GPU of its own", "has NCCL"]),
    ],
)
def test_the_reason_is_said(nprocs: int, machine: Machine, facts: list[str]) -> None:
    _, why = choose(nprocs, machine)
    assert all(fact in why for fact in facts), why


@pytest.mark.ranks
def test_here_it_is_what_the_machine_has(capsys: pytest.CaptureFixture[str]) -> None:
    backend = recommend_backend(4)
    assert backend == ("nccl" if torch.cuda.device_count() >= 4 else "gloo")
    assert capsys.readouterr().out.startswith(f"{backend}: 4 ranks, ")


@pytest.mark.slow
@pytest.mark.system
def test_the_process_that_asks_touches_neither_torch_nor_cuda() -> None:
    code = (
        "import sys\nfrom ddp_lessons import recommend_backend\nrecommend_backend(2)\n"
        "assert 'torch' not in sys.modules\n"
        "import torch\nassert not torch.cuda.is_initialized()\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=250)


@pytest.mark.ranks
def test_a_rank_may_ask_too() -> None:
    def work(rank: int) -> None:
        dist.init_process_group(recommend_backend(2))
        dist.destroy_process_group()

    assert launch(work).ranks[1].output.startswith(("gloo: 2 ranks", "nccl: 2 ranks"))


@pytest.mark.ranks
@pytest.mark.parametrize("nprocs", [np.int64(4), torch.tensor(4)])
def test_a_number_of_ranks_may_be_numpy_s_or_torch_s(
    nprocs: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    assert recommend_backend(nprocs) == recommend_backend(4)
    first, _, again, _ = capsys.readouterr().out.splitlines()
    assert first == again


@pytest.mark.parametrize("nprocs", [0, -1, 2.0, "2", None, True])
def test_bad_numbers_of_ranks(nprocs: Any) -> None:
    with pytest.raises(BadLaunch, match=r"nprocs is .*; it must be a whole number, 1 or more"):
        recommend_backend(nprocs)


@pytest.mark.parametrize("backend", ["nccl", "NCCL", "cuda:nccl", "cpu:gloo,cuda:nccl", None])
def test_names_that_mean_nccl(backend: str | None) -> None:
    assert wants_nccl(backend)


@pytest.mark.parametrize("backend", ["gloo", "cpu:gloo", "cpu:gloo,cuda:gloo", "mpi", "ncll"])
def test_names_that_do_not(backend: str) -> None:
    assert not wants_nccl(backend)


@pytest.mark.parametrize(("ranks", "gpus"), [(1, 1), (2, 2), (1, 8), (4, 0), (0, 1)])
def test_nothing_is_refused_that_may_work_or_that_torch_explains(ranks: int, gpus: int) -> None:
    assert shared_gpu(ranks, gpus) == ""


@pytest.mark.parametrize(("ranks", "gpus"), [(2, 1), (4, 1), (4, 2), (9, 8)])
def test_shared_gpus_are_refused_with_what_to_do(ranks: int, gpus: int) -> None:
    text = shared_gpu(ranks, gpus)
    assert f"{ranks} ranks would share {gpus} GPU" in text
    assert "Duplicate GPU detected" in text
    assert 'init_process_group("gloo")' in text
    assert f"nprocs={gpus}" in text


TWO_OF_TWO = {"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "1"}


@pytest.mark.parametrize(
    ("address", "ranks", "here"),
    [
        ("127.0.0.1", None, 4),  # launch's two "machines" are this one
        ("10.0.0.1", None, 2),
        ("10.0.0.1", [0, 2, 3], 2),
        ("10.0.0.1", [0, 1], 0),
        ("127.0.0.1", [1, 3], 2),
    ],
)
def test_ranks_on_this_machine(address: str, ranks: list[int] | None, here: int) -> None:
    assert on_this_machine({**TWO_OF_TWO, "MASTER_ADDR": address}, ranks) == here


def test_without_the_variables_nobody_knows() -> None:
    for missing in TWO_OF_TWO:
        rest = {name: value for name, value in TWO_OF_TWO.items() if name != missing}
        assert on_this_machine(rest) == 0
    assert on_this_machine({**TWO_OF_TWO, "WORLD_SIZE": "four"}) == 0


def on_one_gpu(_: int, backend: str | None, **options: Any) -> None:
    torch.cuda.device_count = lambda: 1
    dist.init_process_group(backend, **options)
    dist.destroy_process_group()


def refused(run: Run) -> None:
    assert run.verdict is not None
    assert (run.verdict.kind, run.verdict.ranks) == ("raised", tuple(range(run.world_size)))
    assert "would share 1 GPU" in run.verdict.title
    assert run.verdict.frame is not None
    assert run.verdict.frame.function == "on_one_gpu"
    assert "dist.init_process_group(backend" in run.verdict.frame.source
    assert "ddp_lessons/backends.py" not in run.explain()
    assert isinstance(run.ranks[0].exception, dist.DistBackendError)


@pytest.mark.ranks
@pytest.mark.parametrize("backend", ["nccl", "cpu:gloo,cuda:nccl", None])
def test_nccl_on_a_shared_gpu_is_refused_at_the_learners_line(backend: str | None) -> None:
    refused(launch(on_one_gpu, args=(backend,), nprocs=3, check=False))


@pytest.mark.ranks
def test_also_by_ranks_of_several_machines_that_are_one() -> None:
    refused(launch(on_one_gpu, args=("nccl",), nprocs=1, nnodes=2, check=False))


@pytest.mark.ranks
def test_gloo_is_not_refused() -> None:
    assert launch(on_one_gpu, args=("gloo",), nprocs=2).ok


def reaches_torch(run: Run) -> bool:
    return any(r.error is not None and "NCCL built in" in r.error.text for r in run.ranks)


@pytest.mark.ranks
@pytest.mark.skipif(dist.is_nccl_available(), reason="NCCL would begin to communicate")
def test_one_rank_or_gpus_of_its_own_are_left_to_torch() -> None:
    def own_gpu(rank: int) -> None:
        os.environ["CUDA_VISIBLE_DEVICES"] = str(rank)
        on_one_gpu(rank, "nccl")

    def alone(rank: int) -> None:
        on_one_gpu(rank, "nccl", world_size=1, rank=0, store=dist.HashStore())

    assert reaches_torch(launch(own_gpu, check=False))
    assert reaches_torch(launch(alone, check=False))
    allowed = {"NCCL_MULTI_RANK_GPU_ENABLE": "1"}
    assert reaches_torch(launch(on_one_gpu, args=("nccl",), env=allowed, check=False))


def with_a_subgroup(rank: int, ranks: list[int] | None) -> None:
    dist.init_process_group("gloo")
    torch.cuda.device_count = lambda: 2
    dist.new_group(ranks, backend="nccl")


@pytest.mark.ranks
def test_a_subgroup_is_refused_if_its_own_ranks_share() -> None:
    run = launch(with_a_subgroup, args=([0, 1, 2],), nprocs=3, check=False)
    assert "3 ranks would share 2 GPUs" in run.explain()
    run = launch(with_a_subgroup, args=(None,), nprocs=3, check=False)
    assert "3 ranks would share 2 GPUs" in run.explain()


@pytest.mark.ranks
@pytest.mark.skipif(dist.is_nccl_available(), reason="NCCL would begin to communicate")
def test_a_subgroup_of_few_is_not() -> None:
    assert reaches_torch(launch(with_a_subgroup, args=([0, 1],), nprocs=3, check=False))


@pytest.mark.ranks
@pytest.mark.skipif(dist.is_nccl_available(), reason="only a build without NCCL says so")
def test_a_build_without_nccl_says_what_to_use() -> None:
    def work(rank: int) -> None:
        dist.init_process_group("nccl")

    text = launch(work, check=False).explain()
    assert "Distributed package doesn't have NCCL built in" in text
    assert 'dist.init_process_group("nccl")' in text
    assert 'init_process_group("gloo")' in text
    assert "recommend_backend(nprocs)" in text


@pytest.mark.ranks
def test_what_nccl_says_of_a_shared_gpu_is_explained() -> None:
    def work(rank: int) -> None:
        raise dist.DistBackendError(
            "NCCL error in: ProcessGroupNCCL.cpp:1691, invalid usage\n"
            "ncclInvalidUsage: This usually reflects invalid usage of NCCL library.\n"
            "Last error:\nDuplicate GPU detected : rank 1 and rank 0 both on CUDA device 1000"
        )

    assert "torch.cuda.set_device" in launch(work, check=False).explain()
