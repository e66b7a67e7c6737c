"""What a script under torchrun records, and what `load_run` makes of it."""

from __future__ import annotations

import json
import os
import re
import signal
import textwrap
import time
from pathlib import Path

import pytest

from ddp_lessons import Run, load_run
from tests.support import torchrun

pytestmark = [pytest.mark.slow, pytest.mark.system]

HEAD = """
    import os, signal, subprocess, sys, time
    import torch
    import torch.distributed as dist
    from torch.distributed import all_reduce
    from ddp_lessons import span
    rank = int(os.environ["RANK"])
    dist.init_process_group("gloo")
"""


def write(folder: Path, body: str, head: str = HEAD) -> Path:
    script = folder / "train.py"
    script.write_text(textwrap.dedent(head).lstrip() + textwrap.dedent(body).lstrip())
    return script


def record(folder: Path, body: str, *options: str) -> tuple[int | None, str]:
    script = write(folder, body)
    env = {"DDP_LESSONS_RECORD": "record"}
    return torchrun.run(script, "--nproc-per-node=2", *options, env=env)


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The record of a script that ran to its end on two ranks."""
    folder = tmp_path_factory.mktemp("recorded")
    code, text = record(
        folder,
        """
        with span("compute"):
            x = torch.ones(10)
        all_reduce(x)
        if rank == 1:  # what a rank starts inherits the environment, but is no rank
            subprocess.run([sys.executable, "-c", "import ddp_lessons"], check=True)
        dist.barrier()
        dist.destroy_process_group()
        """,
    )
    assert code == 0, text
    return folder / "record"


@pytest.mark.xdist_group("recorded")
def test_a_script_records_its_spans_and_calls(recorded: Path) -> None:
    run = load_run(recorded)
    assert run.ok
    assert run.verdict is None
    assert run.name == "train.py"
    for rank in run.ranks:
        calls = [s.op for s in rank.spans if s.op]
        assert calls == ["init_process_group", "all_reduce", "barrier", "destroy_process_group"]
        (call,) = [s for s in rank.spans if s.op == "all_reduce"]
        assert call.site == f"{recorded.parent / 'train.py'}:10"
        assert (call.nbytes, call.tensor, call.seq) == (40, "float32 (10,)", 0)
        assert [s.name for s in rank.spans if s.kind == "compute"] == ["compute"]
        assert all(s.t1_ns is not None for s in rank.spans)
    assert {share.op for share in run.waits()} == {"all_reduce", "barrier"}


def test_a_script_in_a_folder_with_a_long_path(tmp_path: Path) -> None:
    folder = tmp_path / ("目录" * 35) / ("f" * 100)
    folder.mkdir(parents=True)
    code, text = record(folder, "dist.barrier()\ndist.destroy_process_group()\n")
    assert code == 0, text
    spans = load_run(folder / "record").spans()
    assert {s.site for s in spans if s.op == "barrier"} == {f"{folder / 'train.py'}:8"}


def test_nothing_is_recorded_unless_asked_for(tmp_path: Path) -> None:
    script = write(tmp_path, "print('recorder', 'ddp_lessons.worker.torchrun' in sys.modules)")
    code, text = torchrun.alone(script)
    assert code == 0, text
    assert "recorder False" in text
    assert {file.name for file in tmp_path.iterdir()} == {"train.py"}


def test_a_record_that_cannot_be_written_stops_nobody(tmp_path: Path) -> None:
    (tmp_path / "record").write_text("a file is in the way")
    script = write(tmp_path, "dist.barrier(); print('done')")
    code, text = torchrun.alone(script, env={"DDP_LESSONS_RECORD": "record"})
    assert code == 0, text
    assert "nothing is recorded, DDP_LESSONS_RECORD: " in text
    assert "done" in text


def test_workers_of_a_data_loader_do_not_record(tmp_path: Path) -> None:
    script = write(
        tmp_path,
        """
        from torch.utils.data import DataLoader
        from ddp_lessons import span
        if __name__ == "__main__":
            for how in ("fork", "spawn"):  # a spawned worker imports the script, and so us
                with span(how):
                    list(DataLoader([1.0] * 4, num_workers=1, multiprocessing_context=how))
        """,
        head="",
    )
    code, text = torchrun.alone(script, env={"DDP_LESSONS_RECORD": "record"})
    assert code == 0, text
    run = load_run(tmp_path / "record")
    fetched = ["DataLoader"] * 5  # the last one finds no more
    names = [s.name for s in run.ranks[0].spans]
    assert names == ["train.py", "fork", *fetched, "spawn", *fetched]


@pytest.fixture(scope="module")
def attempts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The record of a script that failed twice: a rank raised, then it was killed."""
    folder = tmp_path_factory.mktemp("attempts")
    code, text = record(
        folder,
        """
        with span("first"):
            dist.barrier()
        attempt = os.environ["TORCHELASTIC_RESTART_COUNT"]
        if rank == 1 and attempt == "0":
            raise ValueError("a bad batch")
        if rank == 1 and attempt == "1":
            os.kill(os.getpid(), signal.SIGKILL)
        while attempt == "1":  # never meets rank 1 again
            pass
        with span("second"):
            dist.barrier()
        dist.destroy_process_group()
        """,
        "--max-restarts=2",
    )
    assert code == 0, text
    assert len(list((folder / "record").glob("*.tape"))) == 6
    return folder / "record"


@pytest.mark.xdist_group("attempts")
def test_an_exception_is_explained_from_the_record(attempts: Path) -> None:
    run = load_run(attempts, attempt=0)
    assert [r.status for r in run.ranks] == ["raised", "raised"]
    assert run.verdict is not None
    assert (run.verdict.kind, run.verdict.ranks) == ("raised", (1,))
    assert run.verdict.frame is not None
    assert run.verdict.frame.lineno == 12
    assert 'raise ValueError("a bad batch")' in run.explain()
    assert "Rank 0 then lost its partner, waiting in barrier" in run.explain()


@pytest.mark.xdist_group("attempts")
def test_a_killed_rank_is_explained_from_the_record(attempts: Path) -> None:
    run = load_run(attempts, attempt=1)
    assert run.verdict is not None
    assert (run.verdict.kind, run.verdict.ranks) == ("killed", (1,))
    assert "rank 1 of 2 ended without an exit status" in run.explain()
    assert "Its last call was barrier" in run.explain()


@pytest.mark.xdist_group("attempts")
def test_ranks_that_torchrun_told_to_end_say_where_they_were(attempts: Path) -> None:
    run = load_run(attempts, attempt=1)
    assert [rank.status for rank in run.ranks] == ["stopped", "died"]
    assert re.search(r"rank 0 was stopped at .*train.py, line 1[56]", run.explain())
    assert run.ranks[0].exitcode == -signal.SIGTERM


def test_timeouts_and_threads_are_recorded(tmp_path: Path) -> None:
    record(
        tmp_path,
        """
        import threading
        from datetime import timedelta
        def feed():
            raise ValueError("a bad sample")
        group = dist.new_group(timeout=timedelta(seconds=2))
        thread = threading.Thread(target=dist.barrier, name="saver")
        thread.start()
        thread.join()
        if rank == 1:
            threading.Thread(target=feed, name="feeder").start()
            time.sleep(60)
        dist.barrier(group)
        """,
    )
    run = load_run(tmp_path / "record")
    assert run.verdict is not None
    assert run.verdict.ranks == (1,)
    text = run.explain()
    assert re.search("The timeout of 2 s that new_group got at .*train.py, line 12 ran out", text)
    assert "thread 'feeder' of rank 1 died of ValueError: a bad sample" in text
    assert [dict(rank.threads) for rank in run.ranks] == 2 * [{"thread 1": "saver"}]


def test_two_threads_report_at_once(tmp_path: Path) -> None:
    script = write(
        tmp_path,
        """
        import threading
        from ddp_lessons import report
        def watch(name):
            for number in range(1000):
                report(**{name: number})
        threads = [threading.Thread(target=watch, args=(name,)) for name in ("loss", "queue")]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        """,
        head="",
    )
    code, text = torchrun.alone(script, env={"DDP_LESSONS_RECORD": "record"})
    assert code == 0, text
    run = load_run(tmp_path / "record")
    for name in ("loss", "queue"):
        assert [row[name] for row in run.reports if name in row] == list(range(1000))
    assert run.ok


def test_a_message_too_long_for_its_recv_is_named_from_the_record(tmp_path: Path) -> None:
    """Gloo aborts the rank, and only its output says why."""
    record(
        tmp_path,
        """
        if rank == 0:
            dist.send(torch.ones(4), 1)
        else:
            dist.recv(torch.zeros(2), 0)
        dist.barrier()
        """,
    )
    run = load_run(tmp_path / "record")
    assert run.verdict is not None
    assert (run.verdict.kind, run.verdict.ranks) == ("tensor mismatch", (0, 1))
    assert "rank 0 sends float32 (4,) to rank 1, whose recv expects float32 (2,)" in run.explain()


def test_a_child_that_is_told_to_end_is_not_the_rank(tmp_path: Path) -> None:
    script = write(
        tmp_path,
        """
        began, begin = os.pipe()
        child = os.fork()
        if not child:
            os.write(begin, b"!")
            signal.pause()
        os.read(began, 1)
        os.kill(child, signal.SIGTERM)
        os.waitpid(child, 0)
        os.kill(os.getpid(), signal.SIGKILL)
        """,
    )
    code, text = torchrun.alone(script, env={"DDP_LESSONS_RECORD": "record"})
    assert code == -signal.SIGKILL, text
    assert load_run(tmp_path / "record").ranks[0].status == "died"


def test_a_child_keeps_the_handler_that_the_script_has_set(tmp_path: Path) -> None:
    script = write(
        tmp_path,
        """
        import os, signal
        import ddp_lessons
        signal.signal(signal.SIGTERM, lambda *_: os._exit(7))
        began, begin = os.pipe()
        child = os.fork()
        if not child:
            os.write(begin, b"!")
            signal.pause()
        os.read(began, 1)
        os.kill(child, signal.SIGTERM)
        print("the child ended with", os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
        """,
        head="",
    )
    code, text = torchrun.alone(script, env={"DDP_LESSONS_RECORD": "record"})
    assert code == 0, text
    assert "the child ended with 7" in text


@pytest.mark.xdist_group("attempts")
def test_the_attempt_after_those_that_failed(attempts: Path) -> None:
    run = load_run(attempts)
    assert run.ok
    assert [s.name for s in run.ranks[1].spans if s.kind == "compute"] == ["first", "second"]


def test_a_rank_that_had_not_begun_before_the_restart(tmp_path: Path) -> None:
    for name in ("first", "second"):
        os.mkfifo(tmp_path / name)
    script = write(
        tmp_path,
        """
        import os, signal, sys
        def begin():
            import ddp_lessons
        def tell(name):
            open(name, "w").close()
        def await_(name):
            open(name).close()
        match os.environ["RANK"], os.environ["TORCHELASTIC_RESTART_COUNT"]:
            case "0", "0":
                begin()
                tell("first")
                signal.pause()
            case "1", "0":
                await_("first")
                sys.exit("no GPU is free yet")
            case "1", "1":
                begin()
                tell("second")
            case "0", "1":
                await_("second")
                begin()
        """,
        head="",
    )
    env = {"DDP_LESSONS_RECORD": "record"}
    code, text = torchrun.run(script, "--nproc-per-node=2", "--max-restarts=1", env=env)
    assert code == 0, text
    assert load_run(tmp_path / "record").ok
    with pytest.raises(FileNotFoundError, match="no record of rank 1"):
        load_run(tmp_path / "record", attempt=0)


def test_a_job_that_hangs_is_explained_while_it_hangs(tmp_path: Path) -> None:
    script = write(
        tmp_path,
        """
        if rank == 0:
            dist.barrier()
        else:
            dist.all_reduce(torch.ones(1))
        """,
    )
    env = {"DDP_LESSONS_RECORD": "record"}
    with torchrun.agent(script, "--standalone", "--nproc-per-node=2", env=env) as process:
        while process.poll() is None and not _all_call(tmp_path / "record"):
            time.sleep(0.1)
        run = load_run(tmp_path / "record")
    assert [r.status for r in run.ranks] == ["stopped", "stopped"]
    assert all(r.pid for r in run.ranks)
    assert run.verdict is not None
    assert run.verdict.kind == "different collectives"
    assert "rank 0 waits in barrier: train.py, line 9" in run.explain().replace(f"{tmp_path}/", "")
    assert "rank 1 waits in all_reduce: train.py, line 11" in run.explain().replace(
        f"{tmp_path}/", ""
    )


def _all_call(folder: Path) -> bool:
    try:
        run = load_run(folder)
    except (OSError, ValueError):  # not all have begun to write
        return False
    return all({"barrier", "all_reduce"} & {s.op for s in rank.spans} for rank in run.ranks)


def copied(recorded: Path, to: Path) -> Path:
    for file in recorded.iterdir():
        (to / file.name).write_bytes(file.read_bytes())
    return to


def facts_of(folder: Path, rank: int) -> Path:
    (file,) = folder.glob(f"rank_{rank}.*.jsonl")
    return file


def test_no_record(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "missing"):
        with pytest.raises(FileNotFoundError, match=r"holds no record.*DDP_LESSONS_RECORD="):
            load_run(folder)


@pytest.mark.xdist_group("recorded")
def test_no_such_attempt(recorded: Path) -> None:
    with pytest.raises(FileNotFoundError, match="holds 1 attempt: there is no 3"):
        load_run(recorded, attempt=3)


@pytest.mark.xdist_group("recorded")
def test_the_record_of_a_rank_is_missing(recorded: Path, tmp_path: Path) -> None:
    for file in copied(recorded, tmp_path).glob("rank_1.*"):
        file.unlink()
    with pytest.raises(FileNotFoundError, match=r"no record of rank 1\. If it ran on another"):
        load_run(tmp_path)


@pytest.mark.xdist_group("recorded")
def test_records_of_two_jobs(recorded: Path, tmp_path: Path) -> None:
    file = facts_of(copied(recorded, tmp_path), 1)
    file.write_text(file.read_text().replace('"world_size": 2', '"world_size": 4'))
    with pytest.raises(ValueError, match=r"jobs with \[2, 4\] ranks"):
        load_run(tmp_path)


@pytest.mark.xdist_group("recorded")
@pytest.mark.parametrize("text", ["", "{}\n", '{"began": {"version": 99}}\n', "no json\n"])
def test_a_record_of_another_version(recorded: Path, tmp_path: Path, text: str) -> None:
    facts_of(copied(recorded, tmp_path), 1).write_text(text)
    with pytest.raises(ValueError, match=r"is no record of a rank|is in format 99"):
        load_run(tmp_path)


@pytest.mark.xdist_group("recorded")
def test_a_tape_file_that_is_truncated(recorded: Path, tmp_path: Path) -> None:
    facts_of(copied(recorded, tmp_path), 1).with_suffix(".tape").write_bytes(b"short")
    with pytest.raises(ValueError, match="is not a whole span buffer"):
        load_run(tmp_path)


@pytest.mark.xdist_group("recorded")
def test_the_last_line_of_a_killed_rank_may_be_cut(recorded: Path, tmp_path: Path) -> None:
    file = facts_of(copied(recorded, tmp_path), 1)
    *whole, last = file.read_text().splitlines()
    assert "ended" in json.loads(last)
    file.write_text("\n".join([*whole, last[:5]]))
    run: Run = load_run(tmp_path)
    assert [rank.status for rank in run.ranks] == ["returned", "died"]


@pytest.mark.xdist_group("recorded")
def test_another_clock_is_put_on_rank_zeros(recorded: Path, tmp_path: Path) -> None:
    before = load_run(recorded)
    file = facts_of(copied(recorded, tmp_path), 1)
    facts = [json.loads(line) for line in file.read_text().splitlines()]
    for fact in facts:
        fact.update({"clock": {"behind_ns": 5_000, "within_ns": 7}} if "clock" in fact else {})
    file.write_text("\n".join(map(json.dumps, facts)))
    after = load_run(tmp_path)
    for old, new in zip(before.ranks[1].spans, after.ranks[1].spans, strict=True):
        assert new.t0_ns - old.t0_ns == 5_000
        assert (new.t1_ns or 0) - (old.t1_ns or 0) == 5_000
    assert after.ranks[0].spans == before.ranks[0].spans
