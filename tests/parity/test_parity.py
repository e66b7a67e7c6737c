"""What a rank returns, raises, prints and exits with is the same by `launch` as by plain torch.

`make parity` runs all features, `make whole` a sample. The features lie in this folder, a module a
subject; those of a module share plain ranks, each a process that torch's spawn has started. Where
the two differ, differences.py says why.
"""

from __future__ import annotations

import contextlib
import difflib
import pprint
import warnings
from collections.abc import Iterator

import pytest

from ddp_lessons import launch
from ddp_lessons.results import RankResult
from ddp_lessons.system.host import reserve_port
from tests.parity import (  # noqa: F401 - each adds its features
    collectives,
    ddp,
    fresh,
    groups,
    libraries,
    processes,
    python,
    sharding,
)
from tests.parity.differences import DIFFERENCES
from tests.parity.features import FEATURES, Feature
from tests.parity.outcomes import Outcome
from tests.parity.plain import PlainRanks

pytestmark = pytest.mark.ranks

# By a Python that was just started.
IGNORED = (ResourceWarning, ImportWarning, PendingDeprecationWarning, DeprecationWarning)


@pytest.fixture(scope="module")
def plain_ranks(request: pytest.FixtureRequest) -> Iterator[PlainRanks]:
    """Plain ranks for all features of a subject."""
    _, ranks = request.param
    with PlainRanks(ranks) as plain:
        yield plain


def _case(feature: Feature) -> object:
    subject = "sample" if feature.sample else feature.name.partition(".")[0]
    marks = [pytest.mark.xdist_group(f"parity {subject}")]
    if not feature.sample:
        marks.append(pytest.mark.parity)
    return pytest.param((subject, feature.ranks), feature, marks=marks, id=feature.name)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("plain_ranks", "feature"),
    [_case(feature) for feature in FEATURES.values() if not feature.alone],
    indirect=["plain_ranks"],
)
def test_shared(plain_ranks: PlainRanks, feature: Feature) -> None:
    compare(feature, by_launch(feature), by_plain_torch(feature, plain_ranks))


@pytest.mark.parametrize(
    "feature",
    [
        pytest.param(f, marks=[] if f.sample else [pytest.mark.parity], id=f.name)
        for f in FEATURES.values()
        if f.alone
    ],
)
def test_alone(feature: Feature) -> None:
    launched = by_launch(feature)
    with PlainRanks(feature.ranks, feature.env, feature.args() if feature.args else ()) as plain:
        compare(feature, launched, by_plain_torch(feature, plain))


def by_plain_torch(feature: Feature, ranks: PlainRanks) -> list[Outcome]:
    with contextlib.closing(reserve_port()) as held:
        return ranks.run(feature, held.getsockname()[1])


def by_launch(feature: Feature) -> list[Outcome]:
    args = feature.args() if feature.args else ()
    with warnings.catch_warnings():
        warnings.resetwarnings()  # pytest's would be the ranks'
        for ignored in IGNORED:
            warnings.simplefilter("ignore", ignored)
        warnings.filterwarnings("default", category=DeprecationWarning, module="__main__")
        run = launch(feature.run, args, feature.ranks, env=feature.env, check=False)
    return [_outcome(rank, feature.alone) for rank in run.ranks]


def _outcome(rank: RankResult, alone: bool) -> Outcome:
    raised = None if rank.error is None or rank.status == "died" else rank.error.text
    if rank.error is not None and rank.error.type_name == "SystemExit":
        raised = None  # the exit code says it
    return Outcome(rank.value, raised, rank.output, rank.exitcode if alone else None)


def compare(feature: Feature, launched: list[Outcome], plain: list[Outcome]) -> None:
    unlike = {
        rank: parts
        for rank, (ours, theirs) in enumerate(zip(launched, plain, strict=True))
        if (parts := ours.unlike(theirs))
    }
    seen = {part for parts in unlike.values() for part in parts}
    expected, why = DIFFERENCES.get(feature.name, (set(), "none is known"))
    assert seen == expected, f"{why}; by launch (-) and by plain torch (+):\n" + "\n".join(
        "\n".join([f"rank {rank}: {part}", *difflib.ndiff(_lines(both[0]), _lines(both[1]))])
        for rank, parts in unlike.items()
        for part, both in parts.items()
    )


def _lines(value: object) -> list[str]:
    text = value if isinstance(value, str) else pprint.pformat(value, width=100)
    return text.splitlines()


def test_each_difference_is_that_of_a_feature() -> None:
    assert DIFFERENCES.keys() <= FEATURES.keys()
