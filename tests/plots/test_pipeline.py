"""`plots.pipeline`: numbered work, idle time and its share, and refused runs."""

from __future__ import annotations

import sys
import time
from typing import Any

import cloudpickle
import matplotlib
import matplotlib.pyplot as plt
import pytest
import torch
import torch.distributed as dist

from ddp_lessons import launch, plots, span, steps
from ddp_lessons.run import Run

matplotlib.use("agg")
pytestmark = [pytest.mark.usefixtures("figures_closed"), pytest.mark.ranks]

cloudpickle.register_pickle_by_value(sys.modules[__name__])


def work(rank: int, marked: bool = True) -> None:
    for _ in steps(range(2)):
        time.sleep(0.2 * rank)
        for name in ("forward", "forward", "augment", "backward", "backward"):
            with span(name if marked else "other"):
                time.sleep(0.05)


@pytest.fixture(scope="module")
def run() -> Run:
    return launch(work, nprocs=2)


def texts(ax: Any) -> list[str]:
    ax.figure.canvas.draw()
    return [text.get_text().strip() for text in ax.texts if text.get_text()]


def boxes(ax: Any) -> list[list[Any]]:
    """The boxes of each row of bars, as they are drawn."""
    return [[path.get_extents() for path in bars.get_paths()] for bars in ax.collections]


def test_work_is_numbered_by_its_order_over_the_idle_time(run: Run) -> None:
    ax = plots.pipeline(run, step=1, title="the finding")
    said = texts(ax)
    assert [text for text in said if text.isdigit()] == ["0", "1", "0", "1"] * 2
    shares = [int(text.removesuffix("% idle")) for text in said if "idle" in text]
    assert len(shares) == 2
    assert all(20 < share < 90 for share in shares)
    assert [label.get_text() for label in ax.get_yticklabels()] == ["rank 0", "rank 1"]
    legend = ax.get_legend()
    assert legend
    assert [text.get_text() for text in legend.get_texts()] == ["forward", "backward", "idle"]
    assert ax.get_title("left") == "the finding"
    (whole,), *works = boxes(ax)[:5]
    assert whole.x0 == 0
    assert all(0 <= box.x0 < box.x1 <= whole.x1 + 1e-6 for (box,) in works)
    assert ax.get_xlim()[1] > whole.x1


def test_without_a_step_all_work_is_shown(run: Run) -> None:
    ax = plots.pipeline(run)
    assert sorted(text for text in texts(ax) if text.isdigit()) == sorted("0123" * 4)
    assert ax.get_title("left") == run.name


def test_a_figure_of_its_own_or_the_axes_given(run: Run) -> None:
    _, given = plt.subplots()
    assert plots.pipeline(run, step=0, ax=given) is given
    assert plots.pipeline(run, step=0) is not given


def test_a_run_without_such_work_is_refused(run: Run) -> None:
    with pytest.raises(ValueError, match="'forward' or 'backward' in step 7"):
        plots.pipeline(run, step=7)
    with pytest.raises(ValueError, match=r"no rank has a span 'forward' or 'backward'$"):
        plots.pipeline(launch(work, args=(False,), nprocs=1))


def receives(rank: int) -> None:
    dist.init_process_group("gloo")
    with span("forward"):
        if rank == 0:
            time.sleep(0.3)
            dist.send(torch.ones(1), 1)
        else:
            dist.recv(torch.ones(1), 0)
            time.sleep(0.1)
    dist.barrier()


def test_a_rank_that_waits_for_a_message_is_idle() -> None:
    ax = plots.pipeline(launch(receives, nprocs=2))
    _, share = (int(text.removesuffix("% idle")) for text in texts(ax) if "idle" in text)
    assert share > 50
    assert [text for text in texts(ax) if text.isdigit()] == ["0", "0"]
    legend = ax.get_legend()
    assert legend
    assert [text.get_text() for text in legend.get_texts()] == ["forward", "idle"]
    assert "numbers: the micro-batch" in ax.get_xlabel()
