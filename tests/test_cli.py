"""`ddp-lessons`: what the command prints and returns."""

from __future__ import annotations

import subprocess
import sys

import pytest

from ddp_lessons import cli


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


def test_version_and_help() -> None:
    assert _command("--version").stdout.startswith("ddp-lessons 0.")
    help_text = _command("--help").stdout
    assert "doctor" in help_text
    assert _command().stdout == help_text
    assert _command("cure").returncode == 2


def test_version_loads_no_torch() -> None:
    code = "import sys, ddp_lessons.cli\ntry: ddp_lessons.cli.main(['--version'])\n"
    code += "except SystemExit: print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False"


@pytest.mark.parametrize(
    ("finding", "mark", "said"),
    [
        (cli.on_python("3.11.7", "linux"), cli.OK, "forked"),
        (cli.on_python("3.13.0", "darwin"), cli.OK, "spawned"),
        (cli.on_python("3.12.1", "win32"), cli.PROBLEM, "WSL"),
        (cli.on_cores(1), cli.NOTE, "take turns"),
        (cli.on_cores(8), cli.OK, "8 cores"),
        (cli.on_memory(600 << 20), cli.PROBLEM, "too little"),
        (cli.on_memory(1 << 30), cli.NOTE, "about 5 small ranks"),
        (cli.on_memory(16 << 30), cli.OK, "enough"),
        (cli.on_shared_memory(64 << 20), cli.NOTE, "--shm-size"),
        (cli.on_shared_memory(None), cli.OK, "No /dev/shm"),
        (cli.on_gloo(False), cli.PROBLEM, "gloo"),
        (cli.on_nccl(False, False, 0), cli.OK, "CPU build"),
        (cli.on_nccl(True, True, 0), cli.OK, "no GPU"),
        (cli.on_nccl(True, True, 2), cli.OK, "up to 2"),
        (cli.on_gpus([]), cli.OK, "none"),
    ],
)
def test_findings(finding: cli.Finding, mark: str, said: str) -> None:
    assert finding.mark == mark
    assert said in finding.text


def test_a_problem_is_the_exit_code(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli, "examine", lambda: iter([cli.on_cores(2), cli.on_gloo(False)]))
    assert cli.doctor() == 1
    assert "keeps ranks from running" in capsys.readouterr().out


def test_a_launch_that_fails_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "no-such-interface")
    finding = cli.on_launch()
    assert finding.mark == cli.PROBLEM
    assert "no-such-interface" in finding.text
