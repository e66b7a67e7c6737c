"""`ddp-lessons doctor`: its findings and how it judges them."""

from __future__ import annotations

import importlib.util
import math
import subprocess
import sys
from pathlib import Path

import pytest

from ddp_lessons import launch
from ddp_lessons.cli import doctor


def _command(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "ddp_lessons.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=250, check=False)


@pytest.mark.slow
@pytest.mark.system
@pytest.mark.alone  # how soon a hang is named is a matter of time
def test_doctor_finds_this_machine_fit() -> None:
    done = _command("doctor")
    assert done.returncode == 0, done.stdout + done.stderr
    for found in ("Python 3", "core", "memory free", "torch ", "gloo (CPU): available", "nccl"):
        assert found in done.stdout
    assert "2 ranks were launched" in done.stdout
    for what in ("failure", "hang"):  # on a busy machine "only after 4 s"
        assert f"The line of a {what} on purpose came back " in done.stdout
    assert done.stdout.endswith("This machine can run the lessons.\n")


@pytest.mark.parametrize(
    ("finding", "mark", "said"),
    [
        (doctor.on_python("3.11.7", "linux"), doctor.OK, "forked"),
        (doctor.on_python("3.13.0", "darwin"), doctor.OK, "spawned"),
        (doctor.on_python("3.12.1", "win32"), doctor.PROBLEM, "WSL"),
        (doctor.on_cores(1), doctor.NOTE, "take turns"),
        (doctor.on_cores(8), doctor.OK, "8 cores"),
        (doctor.on_memory(600 << 20), doctor.PROBLEM, "too little"),
        (doctor.on_memory(1 << 30), doctor.NOTE, "about 5 small ranks"),
        (doctor.on_memory(1 << 30, "darwin"), doctor.PROBLEM, "too little"),
        (doctor.on_memory(16 << 30), doctor.OK, "enough"),
        (doctor.on_shared_memory(64 << 20), doctor.NOTE, "--shm-size"),
        (doctor.on_shared_memory(None), doctor.OK, "No /dev/shm"),
        (doctor.on_gloo(False), doctor.PROBLEM, "gloo"),
        (doctor.on_nccl(False, False, 0), doctor.OK, "CPU build"),
        (doctor.on_nccl(True, True, 0), doctor.OK, "no GPU"),
        (doctor.on_nccl(True, True, 2), doctor.OK, "up to 2"),
        (doctor.on_gpus([]), doctor.OK, "none"),
        (doctor.on_gpus(["H100"]), doctor.OK, "H100"),
    ],
)
def test_findings(finding: doctor.Finding, mark: str, said: str) -> None:
    assert finding.mark == mark
    assert said in finding.text


@pytest.mark.parametrize(
    ("quota", "cores"), [("150000 100000", 1.5), ("max 100000", math.inf), (None, math.inf)]
)
def test_the_quota_of_a_container(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quota: str | None, cores: float
) -> None:
    monkeypatch.setattr(doctor, "CPU_QUOTA", tmp_path / "cpu.max")
    if quota is not None:
        (tmp_path / "cpu.max").write_text(quota)
    assert doctor.cpu_quota() == cores
    assert 1 <= doctor.usable_cores() <= max(1.0, cores)


@pytest.mark.system
def test_without_torch_nothing_is_launched() -> None:
    code = (
        "import sys; sys.modules['torch'] = None; import ddp_lessons.cli as c; c.main(['doctor'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "torch cannot be imported" in done.stdout
    assert "launched" not in done.stdout
    assert "Traceback" not in done.stdout + done.stderr


def test_a_problem_is_the_exit_code(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        doctor, "examine", lambda: iter([doctor.on_cores(2), doctor.on_gloo(False)])
    )
    assert doctor.doctor() == 1
    assert "keeps the lessons from working" in capsys.readouterr().out


@pytest.mark.ranks
def test_a_launch_that_fails_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "no-such-interface")
    finding = doctor.on_launch()
    assert finding.mark == doctor.PROBLEM
    assert "no-such-interface" in finding.text


def test_versions_that_are_newer_than_tested_are_named() -> None:
    newest = dict.fromkeys(doctor.MATTER, "99") | {"cloudpickle": "2.9", "torch": "1.13.1"}
    first, *notes = doctor.on_versions(newest)
    assert first.mark == doctor.OK
    assert "numpy" in first.text
    assert "cloudpickle" not in first.text
    assert {note.mark for note in notes} == {doctor.NOTE}
    assert any("pip install 'cloudpickle<=2.9'" in note.text for note in notes)
    assert any("pip install 'torch<=1.13.1'" in note.text for note in notes)


def test_what_it_was_tested_with_is_known_of_everything_that_matters() -> None:
    assert {*doctor.MATTER} <= {*doctor.tested()}
    assert all(doctor._number(version) for version in doctor.tested().values())


def test_lessons_lack_what_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert doctor.missing_packages() == {}
    (ok,) = doctor.on_lessons({})
    assert ok.mark == doctor.OK
    find = importlib.util.find_spec
    hidden = ("ipyparallel", "sklearn")
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name in hidden else find(name)
    )
    assert doctor.missing_packages()["ipyparallel"] == ["13"]
    texts = [finding.text for finding in doctor.on_lessons(doctor.missing_packages())]
    said = "Lesson 13 imports ipyparallel; without it a part is skipped: pip install ipyparallel"
    assert said in texts


# Simulated installations with real ranks.
LOST_NAMES = "from ddp_lessons.wire import unfiled; unfiled.place_of = lambda code: ('<lost>', 7)"
LOST_LINES = (
    "from ddp_lessons.wire import stacks; "
    "stacks.position = lambda frames: stacks.Position(None, None)"
)


@pytest.mark.slow
@pytest.mark.system
@pytest.mark.parametrize("broken", [LOST_NAMES, LOST_LINES])
def test_an_installation_that_loses_lines_is_a_problem(broken: str) -> None:
    code = f"{broken}\nimport sys, ddp_lessons.cli as c\nsys.exit(c.main(['doctor']))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=250)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "The line of a failure on purpose did not come back" in done.stdout
    assert "pip install 'cloudpickle==" in done.stdout
    assert "This machine can run the lessons" not in done.stdout


@pytest.mark.ranks
def test_a_line_that_comes_late_is_a_note() -> None:
    run = launch(doctor.cell()["fails"], nprocs=2, check=False)
    assert doctor.on_line("a failure", run, 2.9).mark == doctor.OK
    late = doctor.on_line("a failure", run, 8.0)
    assert (late.mark, "8 s" in late.text) == (doctor.NOTE, True)
