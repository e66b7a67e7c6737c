"""`load_run` on records that are damaged, or made to do harm."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ddp_lessons import Run, load_run
from ddp_lessons.wire.run_folder import VERSION
from ddp_lessons.wire.span_buffer import REGION, CallFacts, SpanWriter
from tests.end_to_end.conftest import Trained
from tests.support import torchrun

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("by one agent")]

TIMES = 60  # damaged copies of each record
SECRET = "root:x:0:0: a line that nobody may see"

RAISES = """
    import os, time
    import torch, torch.distributed as dist
    from ddp_lessons import span, steps

    rank = int(os.environ["RANK"])
    dist.init_process_group("gloo")
    pair = dist.new_group([0, 1])
    for _ in steps(range(3)):
        with span("forward"):
            x = torch.ones(10)
        dist.all_reduce(x)
        dist.all_reduce(x, async_op=True).wait()
        dist.broadcast(x, 0, group=pair)
        dist.send(x, 0) if rank else dist.recv(x, 1)
    if rank:
        try:
            [][0]
        except IndexError as error:
            raise ValueError("a bad batch") from error
    while True:  # until torchrun tells it to end, which leaves a stack
        pass
"""


@pytest.fixture(scope="module")
def raised(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The record of a rank that raised, and of one that was told to end."""
    script = tmp_path_factory.mktemp("raised") / "train.py"
    script.write_text(textwrap.dedent(RAISES).lstrip())
    torchrun.run(script, "--nproc-per-node=2", env={"DDP_LESSONS_RECORD": "record"})
    return script.with_name("record")


@pytest.fixture
def trained(by_one_agent: Trained) -> Path:
    """The record of a training that came to its end."""
    return by_one_agent.record


@pytest.mark.system
@pytest.mark.parametrize("which", ["raised", "trained"])
def test_any_damage_ends_in_a_run_or_an_error_that_names_the_file(
    which: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    record = request.getfixturevalue(which)
    command = [sys.executable, "-W", "ignore", "-m", "tests.support.damage", str(record)]
    done = subprocess.run(
        [*command, str(tmp_path / "copy"), which, str(TIMES)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    first, _, rest = done.stdout.partition(" of ")
    assert (done.returncode, rest) == (0, f"{TIMES}\n"), done.stdout
    assert first.startswith("loaded ")
    assert 0 < int(first.split()[1]) < TIMES


Maker = Callable[..., Run]


@pytest.fixture
def made(tmp_path: Path) -> Maker:
    """A run of one rank, loaded from a record made by hand."""
    folder = tmp_path / "record"
    folder.mkdir()

    def make(site: str | None = None, told: str = "", more: str = "", **facts: Any) -> Run:
        base = folder / "rank_0.7"
        began = {
            "version": VERSION,
            "script": "train.py",
            "rank": 0,
            "world_size": 1,
            "local_rank": 0,
            "group_rank": 0,
            "host": "host0",
            "pid": 7,
            "epoch_ns": 7,
            "t_ns": 1,
        }
        began.update(facts.pop("began", {}))
        lines = [{"began": began}, *({name: value} for name, value in facts.items())]
        base.with_suffix(".7.jsonl").write_text("".join(json.dumps(f) + "\n" for f in lines) + more)
        base.with_suffix(".7.stack").write_text(told)
        with open(base.with_suffix(".7.tape"), "w+b") as file:
            file.truncate(REGION)
            writer = SpanWriter(file.fileno(), 0, 0)
            writer.begin(
                "main", "comm", "barrier", 10, facts=CallFacts("barrier", "world", 0, site=site)
            )
        return load_run(folder)

    return make


def raises(filename: str, lineno: int = 2) -> dict[str, Any]:
    """An exception in a file."""
    frame = {
        "filename": filename,
        "lineno": lineno,
        "function": "work",
        "source": "recorded_line()",
    }
    error = {"type_name": "ValueError", "text": "ValueError: no", "frames": [frame]}
    return {"t_ns": 20, **error, "previous": None, "link": ""}


def dump(filename: str) -> str:
    """What faulthandler prints of a rank in a file."""
    return f'Current thread 0x7 (most recent call first):\n  File "{filename}", line 2 in work\n'


@pytest.fixture
def secret(tmp_path: Path) -> str:
    """A file of the machine that has nothing to do with the record."""
    file = tmp_path / "secret.py"
    file.write_text(f"# {SECRET}\n" * 5)
    return str(file)


def shown(run: Run) -> str:
    assert run.verdict is not None
    frame = run.verdict.frame
    return "\n".join([run.explain(), repr(run), run._repr_html_(), repr(run.ranks), repr(frame)])


@pytest.mark.parametrize("version", [1, VERSION + 1])
def test_a_record_in_another_format_says_which(made: Maker, version: int) -> None:
    with pytest.raises(
        ValueError, match=f"jsonl is in format {version}, .* reads format {VERSION}"
    ):
        made(began={"version": version})


def test_a_script_that_was_edited_between_two_jobs_is_shown_as_it_was_run(
    made: Maker, tmp_path: Path
) -> None:
    script = tmp_path / "train.py"
    for line in ("here_first()", "now_here()"):
        script.write_text(f"import torch\n{line}\n")
        digest = hashlib.sha256(script.read_bytes()).hexdigest()
        run = made(site=f"{script}:2", file={"name": str(script), "sha256": digest})
        assert f"train.py, line 2:  {line}" in run.explain()


def test_no_line_of_a_file_that_a_record_names_is_shown(made: Maker, secret: str) -> None:
    for run in (
        made(raised=raises(secret)),
        made(site="train.py:7", handling={"site": "train.py:7", "t0_ns": 10, **raises(secret)}),
        made(site="train.py:7", thread_died={"thread": "saver", **raises(secret)}),
        made(told=dump(secret)),
        made(told=dump("/x/../" * 3 + secret)),
        made(told=dump(os.path.relpath(secret))),
        made(site=f"{secret}:2"),
    ):
        text = shown(run)
        assert "secret.py, line 2" in text
        assert SECRET not in text
    assert "recorded_line()" in shown(made(raised=raises(secret)))


def test_a_file_with_another_content_than_the_one_that_ran_is_not_shown(
    made: Maker, secret: str
) -> None:
    noted = {"name": secret, "sha256": "0" * 64}
    assert SECRET not in shown(made(site=f"{secret}:2", file=noted))


@pytest.mark.ranks
def test_a_script_that_was_changed_since_is_not_shown(raised: Path) -> None:
    script = raised.parent / "train.py"
    text = script.read_text()
    assert "[][0]" in load_run(raised).explain()
    assert "if rank:\n" in text
    assert "while True:" in load_run(raised).explain()
    try:
        script.write_text("# another\n" * 40)
        assert "# another" not in load_run(raised).explain()
    finally:
        script.write_text(text)


@pytest.mark.parametrize("how", ["raised", "told", "site"])
def test_what_a_record_names_is_not_opened(made: Maker, tmp_path: Path, how: str) -> None:
    fifo = tmp_path / "fifo.py"
    os.mkfifo(fifo)
    noted = {"name": str(fifo), "sha256": "0" * 64}
    facts = {"raised": raises(str(fifo)), "told": dump(str(fifo)), "site": f"{fifo}:2"}
    assert "fifo.py, line 2" in shown(made(**{how: facts[how]}, file=noted))  # or waits forever


def test_a_world_of_a_billion_ranks(made: Maker) -> None:
    with pytest.raises(ValueError, match=r"rank_0\.7\.jsonl is damaged: 'world_size'"):
        made(began={"world_size": 10**9})


@pytest.mark.parametrize("seconds", [-1, "2", None, float("nan"), float("inf"), True])
def test_a_timeout_that_is_no_time(made: Maker, seconds: Any) -> None:
    own = {"seconds": seconds, "call": "barrier", "site": None}
    with pytest.raises(ValueError, match=r"rank_0\.7\.jsonl is damaged: 'seconds'"):
        made(gives_up=own)


def test_the_rank_of_another_file(made: Maker) -> None:
    with pytest.raises(ValueError, match=r"rank_0\.7\.jsonl is damaged: 'rank'"):
        made(began={"rank": 3, "world_size": 4})


@pytest.mark.ranks
def test_nothing_is_unpickled(made: Maker, raised: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("something is unpickled")

    for name in ("load", "loads", "Unpickler", "_load", "_loads", "_Unpickler"):
        monkeypatch.setattr(pickle, name, refuse)
    load_run(raised).explain()
    shown(made(more=repr(pickle.dumps(print))))


@pytest.mark.ranks
def test_a_file_that_shrinks_while_it_is_read_ends_nobody(
    raised: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for file in raised.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (span_file,) = tmp_path.glob("rank_1.*.tape")
    read = os.pread

    def shrink(descriptor: int, size: int, at: int) -> bytes:
        if os.fstat(descriptor).st_ino == span_file.stat().st_ino:
            os.truncate(span_file, 100)
        return read(descriptor, size, at)

    monkeypatch.setattr(os, "pread", shrink)
    with pytest.raises(ValueError, match=r"rank_1\..*\.tape is damaged"):
        load_run(tmp_path)
