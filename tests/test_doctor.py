"""`ddp-lessons doctor`: what it finds, and what it makes of that."""

from __future__ import annotations

import subprocess
import sys

import pytest

from ddp_lessons import doctor


def _command(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "ddp_lessons.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)


def test_doctor_finds_this_machine_fit() -> None:
    done = _command("doctor")
    assert done.returncode == 0, done.stdout + done.stderr
    for found in ("Python 3", "core", "memory free", "torch ", "gloo (CPU): available", "nccl"):
        assert found in done.stdout
    assert "2 ranks were launched" in done.stdout
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
        (doctor.on_memory(16 << 30), doctor.OK, "enough"),
        (doctor.on_shared_memory(64 << 20), doctor.NOTE, "--shm-size"),
        (doctor.on_shared_memory(None), doctor.OK, "No /dev/shm"),
        (doctor.on_gloo(False), doctor.PROBLEM, "gloo"),
        (doctor.on_nccl(False, False, 0), doctor.OK, "CPU build"),
        (doctor.on_nccl(True, True, 0), doctor.OK, "no GPU"),
        (doctor.on_nccl(True, True, 2), doctor.OK, "up to 2"),
        (doctor.on_gpus([]), doctor.OK, "none"),
    ],
)
def test_findings(finding: doctor.Finding, mark: str, said: str) -> None:
    assert finding.mark == mark
    assert said in finding.text


def test_a_problem_is_the_exit_code(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        doctor, "examine", lambda: iter([doctor.on_cores(2), doctor.on_gloo(False)])
    )
    assert doctor.doctor() == 1
    assert "keeps ranks from running" in capsys.readouterr().out


def test_a_launch_that_fails_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "no-such-interface")
    finding = doctor.on_launch()
    assert finding.mark == doctor.PROBLEM
    assert "no-such-interface" in finding.text
