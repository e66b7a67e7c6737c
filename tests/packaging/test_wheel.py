"""The wheel and the sdist, built and installed for real: what is in them, and that they work.

The installed command runs from an empty folder with an empty home, so nothing of the repository or
of the user's settings can help it.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tarfile
import time
import urllib.error
import urllib.request
import zipfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple
from urllib.parse import parse_qs, urlsplit

import psutil
import pytest

import ddp_lessons
from ddp_lessons.course import lesson_files
from tests.conftest import MARK
from tests.support.checkout import ROOT

pytestmark = [pytest.mark.slow, pytest.mark.system, pytest.mark.xdist_group("wheel")]

LESSON = "00_start_here.ipynb"
NOTIFICATIONS = "@jupyterlab/apputils-extension:notification"
MOST_BYTES = 15 << 20


class Installed(NamedTuple):
    """An installed wheel, and an empty home for whoever uses it."""

    target: Path
    home: Path

    def environment(self) -> dict[str, str]:
        kept = {name: os.environ[name] for name in ("PATH", "TMPDIR", MARK) if name in os.environ}
        return {**kept, "HOME": str(self.home), "PYTHONPATH": str(self.target)}

    def command(self, *arguments: str) -> list[str]:
        return [str(self.target / "bin" / "ddp-lessons"), *arguments]

    def run(self, *arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.command(*arguments),
            env=self.environment(),
            cwd=cwd,
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )


class Built(NamedTuple):
    """What one build made: the sdist, and the wheel that was made from it."""

    sdist: Path
    wheel: Path


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    folder = tmp_path_factory.mktemp("built")
    _build(folder)
    (sdist,), (wheel,) = folder.glob("*.tar.gz"), folder.glob("*.whl")
    return Built(sdist, wheel)


@pytest.fixture(scope="module")
def installed(built: Built, tmp_path_factory: pytest.TempPathFactory) -> Installed:
    target = tmp_path_factory.mktemp("installed")
    options = ["--no-deps", "--no-index", "--no-compile", "--disable-pip-version-check"]
    subprocess.run(
        [sys.executable, "-m", "pip", "install", *options, "--target", target, built.wheel],
        check=True,
        capture_output=True,
        timeout=100,
    )
    return Installed(target, tmp_path_factory.mktemp("home"))


def _build(folder: Path, *options: str) -> None:
    command = [sys.executable, "-m", "build", "--no-isolation", *options, "--outdir", str(folder)]
    subprocess.run([*command, str(ROOT)], check=True, capture_output=True, timeout=250)


def _in_wheel(wheel: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def test_the_wheel_holds_the_package_and_the_lessons(built: Built) -> None:
    found = {n: c for n, c in _in_wheel(built.wheel).items() if ".dist-info/" not in n}
    package = [path for path in (ROOT / "ddp_lessons").rglob("*.*") if path.suffix != ".pyc"]
    expected = {path.relative_to(ROOT).as_posix(): path.read_bytes() for path in package}
    for name in lesson_files.files(ROOT / "notebooks"):
        expected[f"ddp_lessons/notebooks/{name}"] = (ROOT / "notebooks" / name).read_bytes()
    assert sorted(found) == sorted(expected)
    assert found == expected
    assert built.wheel.stat().st_size < MOST_BYTES


def test_a_wheel_from_the_tree_is_the_same(built: Built, tmp_path: Path) -> None:
    _build(tmp_path, "--wheel")
    assert _in_wheel(tmp_path / built.wheel.name) == _in_wheel(built.wheel)


def test_the_sdist_holds_what_building_and_testing_need(built: Built) -> None:
    with tarfile.open(built.sdist) as archive:
        names = {str(PurePosixPath(*PurePosixPath(name).parts[1:])) for name in archive.getnames()}
    tests = [path for path in (ROOT / "tests").rglob("*") if path.suffix in (".py", ".cfg")]
    notebooks = (ROOT / "notebooks" / name for name in lesson_files.files(ROOT / "notebooks"))
    files = ("pyproject.toml", "Makefile", "README.md", "LICENSE", "binder/install.py")
    needed = {path.relative_to(ROOT).as_posix() for path in (*tests, *notebooks)} | {*files}
    assert needed <= names
    strange = re.compile(
        r"(^|/)(\.venv|\.git|__pycache__|\.\w+_cache|\.ipynb_checkpoints|dist)(/|$)"
    )
    assert not [name for name in names if strange.search(name)]


def test_an_editable_installation_uses_the_repository(tmp_path: Path) -> None:
    """A wheel for it holds a path and no lessons: those of the repository are found beside it."""
    code = f"import hatchling.build as b; print(b.build_editable({str(tmp_path)!r}))"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    found = _in_wheel(wheel)
    (path,) = [text for name, text in found.items() if name.endswith(".pth")]
    assert path.decode().strip() == str(ROOT)
    assert not [name for name in found if name.startswith("ddp_lessons/")]


def test_the_installed_command_works_in_an_empty_folder(
    installed: Installed, tmp_path: Path
) -> None:
    version = installed.run("--version", cwd=tmp_path).stdout
    assert version == f"ddp-lessons {ddp_lessons.__version__}\n"
    listed = installed.run("list", cwd=tmp_path)
    assert "05      distributed_sampler" in listed.stdout, listed.stderr
    assert not list(tmp_path.iterdir())
    assert not list(installed.home.iterdir())


class Server(NamedTuple):
    """A JupyterLab that the installed command started, and what it printed of itself."""

    process: subprocess.Popen[str]
    keyboard: int  # what is written to it is typed in the server's terminal
    address: str
    token: str

    def ask(self, path: str, token: bool = True, **more: Any) -> tuple[int, str, str]:
        """Status, final path and text of what the server answers."""
        headers = {"Authorization": f"token {self.token}"} if token else {}
        request = urllib.request.Request(f"{self.address}{path}", headers=headers, **more)
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:
                return answer.status, urlsplit(answer.url).path, answer.read().decode()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, path, error.read().decode()


@pytest.fixture
def server(installed: Installed, tmp_path: Path) -> Iterator[Server]:
    """The server on a free port of its own choice, in an empty folder."""
    options = ["--no-browser", "--", "--port=0", "--allow-root"]
    keyboard, stdin = os.openpty()  # without a terminal Jupyter leaves its own files behind
    process = subprocess.Popen(
        installed.command(*options),
        env=installed.environment(),
        cwd=tmp_path,
        text=True,
        stdin=stdin,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    os.close(stdin)
    with process:
        try:
            address = urlsplit(_printed_address(process))
            token = parse_qs(address.query)["token"][0]
            _wait_for(process, address.port or 0)
            yield Server(process, keyboard, f"http://{address.netloc}", token)
        finally:
            process.kill()
            os.close(keyboard)


def _printed_address(process: subprocess.Popen[str]) -> str:
    assert process.stdout
    seen = []
    for line in process.stdout:
        seen.append(line)
        if found := re.search(r"http://127\.0\.0\.1:\d+/lab/tree/00_start_here\.ipynb\?\S+", line):
            return found[0]
    pytest.fail("no address: " + "".join(seen))


def _wait_for(process: subprocess.Popen[str], port: int) -> None:
    """Until the server listens: it prints its address shortly before."""
    while process.poll() is None:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
            return
        time.sleep(0.05)
    pytest.fail("the server ended before it listened")


def test_the_installed_command_serves_the_lessons(
    installed: Installed, server: Server, tmp_path: Path
) -> None:
    assert server.ask(f"/lab/tree/{LESSON}")[:2] == (200, f"/lab/tree/{LESSON}")
    status, _, text = server.ask(f"/api/contents/{LESSON}")
    assert status == 200
    assert json.loads(text)["content"]["cells"]
    _is_shut_to_strangers(server)
    _does_not_ask_about_news(server)
    _running_is_no_change(installed, server, tmp_path)
    _ends_with_nothing_left(server, installed)


def _is_shut_to_strangers(server: Server) -> None:
    assert server.ask(f"/lab/tree/{LESSON}", token=False)[1] == "/login"
    assert server.ask(f"/api/contents/{LESSON}", token=False)[0] == 403
    listening = [c for c in psutil.Process(server.process.pid).net_connections() if not c.raddr]
    assert {connection.laddr.ip for connection in listening} <= {"127.0.0.1", "::1"}


def _does_not_ask_about_news(server: Server) -> None:
    settings = json.loads(server.ask(f"/lab/api/settings/{NOTIFICATIONS}")[2])
    assert settings["schema"]["properties"]["fetchNews"]["default"] == "false"
    assert settings["raw"] == "{}"  # the user's own


def _running_is_no_change(installed: Installed, server: Server, folder: Path) -> None:
    """Jupyter stores a lesson with other outputs and one empty cell more, as after running it."""
    given = (folder / "ddp-lessons" / LESSON).read_bytes()
    model = json.loads(server.ask(f"/api/contents/{LESSON}")[2])
    cells = model["content"]["cells"]
    for cell in cells:
        cell.update({"outputs": [], "execution_count": 7} if cell["cell_type"] == "code" else {})
    cells.append({**cells[1], "id": "appended", "source": ""})
    asked = {"type": "notebook", "content": model["content"]}
    server.ask(f"/api/contents/{LESSON}", data=json.dumps(asked).encode(), method="PUT")
    assert (folder / "ddp-lessons" / LESSON).read_bytes() != given
    assert "Changed by you: none" in installed.run("list", cwd=folder).stdout


def _ends_with_nothing_left(server: Server, installed: Installed) -> None:
    assert server.ask("/api/kernels", data=b"{}", method="POST")[0] == 201
    children = psutil.Process(server.process.pid).children(recursive=True)
    assert children
    server.process.send_signal(signal.SIGINT)
    os.write(server.keyboard, b"y\n")  # it asks whether to shut down
    output, _ = server.process.communicate(timeout=30)
    assert server.process.returncode == 0, output
    with pytest.raises(OSError, match="refused"):
        server.ask("/api")
    assert not [child for child in children if child.is_running()]
    assert not list(installed.home.rglob("jpserver-*"))
