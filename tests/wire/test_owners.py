"""The owner of a file by its path, on this host and on others."""

from __future__ import annotations

import functools
import json
import site

import numpy as np
import pytest
import torch

from ddp_lessons import launch
from ddp_lessons.wire import stacks
from ddp_lessons.wire.owners import Owner, home_of, owner_of

# A folder and file that torch.compile made (torch 2.13).
COMPILED = "xn/cxnnymzyrvypw52bg24hon4hrdzmp5xpgiodgmn75dqnnep3vrs2.py"


@pytest.mark.parametrize(
    ("filename", "owner"),
    [
        (__file__, Owner.LEARNER),
        ("/home/me/train.py", Owner.LEARNER),
        ("<string>", Owner.LEARNER),
        ("<timed exec>", Owner.LEARNER),
        ("<dynamic-code>", Owner.LEARNER),  # made by cloudpickle
        ("train.py", Owner.LEARNER),
        (pytest.__file__, Owner.PACKAGE),
        ("/opt/env/lib/python3.12/site-packages/trainer/loop.py", Owner.PACKAGE),  # on another host
        ("/usr/lib/python3/dist-packages/trainer.py", Owner.PACKAGE),
        (json.__file__, Owner.LIBRARY),
        ("/opt/env/lib/python3.12/threading.py", Owner.LIBRARY),
        ("/opt/env/lib/python3.13t/threading.py", Owner.LIBRARY),
        (torch.__file__, Owner.LIBRARY),
        (f"{site.getusersitepackages()}/torch/nn/functional.py", Owner.LIBRARY),
        (stacks.__file__, Owner.LIBRARY),
        ("/opt/env/lib/python3.12/site-packages/ddp_lessons/worker/main.py", Owner.LIBRARY),
        ("<frozen importlib._bootstrap>", Owner.LIBRARY),
        ("<eval_with_key>.3", Owner.LIBRARY),
        (f"/tmp/torchinductor_me/{COMPILED}", Owner.LIBRARY),
        (f"/home/me/cache/{COMPILED}", Owner.LIBRARY),
        (f"/home/me/not/{COMPILED.rpartition('/')[2]}", Owner.LEARNER),
        ("", Owner.LIBRARY),
    ],
)
def test_whose_file_it_is(filename: str, owner: Owner) -> None:
    assert owner_of(filename) is owner


def test_the_package_of_the_launched_function_is_the_learners() -> None:
    file = "/opt/env/lib/python3.12/site-packages/trainer/loop.py"
    other = "/opt/env/lib/python3.12/site-packages/helper/loop.py"
    assert owner_of(file, "trainer") is Owner.LEARNER
    assert owner_of(other, "trainer") is Owner.PACKAGE


@pytest.mark.ranks
def test_where_a_function_is_at_home() -> None:
    assert home_of(pytest.importorskip) == "_pytest"
    assert home_of(functools.partial(pytest.importorskip, "x")) == "_pytest"
    assert home_of(np.random.RandomState) is None  # written in C
    assert home_of(torch.distributed.all_reduce) is None
    assert home_of(launch) is None
    assert home_of(json.dumps) is None
    assert home_of(lambda rank: rank) is None
    assert home_of(len) is None
