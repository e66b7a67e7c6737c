"""The web site of the lessons (`make docs`): it builds without a network, is whole, and readable.

It is built once, from the stored notebooks, and then looked at as HTML.
"""

from __future__ import annotations

import os
import re
import runpy
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path
from unittest.mock import patch
from urllib.parse import unquote, urlsplit

import nbformat
import pytest
from bs4 import BeautifulSoup, Tag

import ddp_lessons
from ddp_lessons import plots
from ddp_lessons.course.lesson_files import tasks

pytest.importorskip("myst_nb", reason="the site needs: make tools")
pytest.importorskip("furo", reason="the site needs: make tools")

from tests.support.checkout import ROOT

pytestmark = [pytest.mark.slow, pytest.mark.system, pytest.mark.xdist_group("docs")]

SOURCE = ROOT / "notebooks"
NOTEBOOKS = sorted(
    p.relative_to(SOURCE) for p in SOURCE.rglob("*.ipynb") if ".ipynb_" not in str(p)
)
LESSONS = [path for path in NOTEBOOKS if re.match(r"\d\d[a-z]?_|real_", str(path))]
PAGES = sorted(p.relative_to(SOURCE) for p in SOURCE.glob("*.md"))
CONTROLS = "application/vnd.jupyter.widget-view+json"
# What a browser fetches by itself, and the attribute that says from where.
FETCHED = {"img": "src", "script": "src", "link": "href", "iframe": "src", "source": "src"}


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the built site."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "sphinx", "-E", "-W", "--keep-going", "-q", "-n", "-b", "html"]
    folders = [str(SOURCE), str(folder / "html"), "-d", str(folder / "doctrees")]
    done = subprocess.run(
        [*_no_network(), *command, *folders],
        capture_output=True,
        text=True,
        timeout=280,  # on a busy machine; half a minute on a quiet one
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
    )
    assert (done.returncode, done.stderr) == (0, "")
    return folder / "html"


def _no_network() -> list[str]:
    """A prefix that takes the network from a command, where that is permitted."""
    prefix = ["unshare", "--net"]
    try:
        permitted = subprocess.run([*prefix, "true"], capture_output=True).returncode == 0
    except FileNotFoundError:
        return []
    return prefix if permitted else []


@cache
def parsed(path: Path) -> BeautifulSoup:
    return BeautifulSoup(path.read_text(), "html.parser")


def html_pages(site: Path) -> list[Path]:
    return sorted(site.rglob("*.html"))


def article(path: Path) -> Tag:
    """The part of a page that is not furniture."""
    found = parsed(path).find("article")
    assert isinstance(found, Tag)
    return found


def test_there_is_a_page_for_every_notebook_and_text(site: Path) -> None:
    assert len(NOTEBOOKS) > 28
    for source in (*NOTEBOOKS, *PAGES):
        assert (site / source.with_suffix(".html")).exists(), source


def test_a_readers_own_notebook_is_left_out(tmp_path: Path) -> None:
    shutil.copy(SOURCE / "conf.py", tmp_path)
    for name in ("Untitled.ipynb", "00_a.ipynb", ".ipynb_checkpoints/00_a-checkpoint.ipynb"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    with patch.object(sys, "path", [*sys.path]):
        left_out = {*runpy.run_path(str(tmp_path / "conf.py"))["exclude_patterns"]}
    assert left_out == {"_docs", "Untitled.ipynb", ".ipynb_checkpoints/00_a-checkpoint.ipynb"}


def test_the_start_page_lists_every_lesson(site: Path) -> None:
    table = parsed(site / "index.html").select_one(".lesson-table table")
    assert table is not None
    pages = [f"{name}.html" for name in (*(path.stem for path in LESSONS), "gpu")]
    assert [link["href"] for link in table.find_all("a")] == pages


def test_the_start_page_has_a_map_whose_lessons_are_links(site: Path) -> None:
    drawing = parsed(site / "index.html").select_one(".lesson-map svg")
    assert drawing is not None
    pages = sorted(f"{name}.html" for name in (*(path.stem for path in LESSONS), "gpu"))
    assert sorted(str(link["href"]) for link in drawing.find_all("a")) == pages
    assert drawing.find("desc") is not None


def test_every_internal_link_leads_to_a_page_and_a_place(site: Path) -> None:
    broken = [
        f"{page.relative_to(site)}: {target}"
        for page in html_pages(site)
        for target in internal_targets(page)
        if not leads_somewhere(page, target)
    ]
    assert not broken


@cache
def internal_targets(page: Path) -> set[str]:
    soup = parsed(page)
    found = {str(tag["href"]) for tag in soup.find_all(["a", "link"], href=True)}
    found |= {str(tag["src"]) for tag in soup.find_all(src=True)}
    return {t for t in found if not urlsplit(t).scheme and not t.startswith("//")}


def leads_somewhere(page: Path, target: str) -> bool:
    url = urlsplit(target)
    file = (page.parent / unquote(url.path)).resolve() if url.path else page
    if not file.exists():
        return False
    if not url.fragment or file.suffix != ".html":
        return True
    return unquote(url.fragment) in places(file)


@cache
def places(page: Path) -> set[str]:
    """The ids on a page."""
    return {str(tag["id"]) for tag in parsed(page).find_all(id=True)}


def test_the_checker_of_links_sees_broken_ones(site: Path) -> None:
    page = site / "faq.html"
    assert leads_somewhere(page, "glossary.html#term-rank")
    assert not leads_somewhere(page, "glossary.html#term-rang")
    assert not leads_somewhere(page, "glossaries.html")


def test_no_link_leads_to_a_notebook_or_text_instead_of_its_page(site: Path) -> None:
    for page in html_pages(site):
        for target in internal_targets(page):
            path = urlsplit(target).path
            assert not path.endswith(".md"), f"{page.name}: {target}"
            assert not path.endswith(".ipynb") or "_downloads/" in path, f"{page.name}: {target}"


def test_nothing_is_fetched_from_elsewhere(site: Path) -> None:
    for page in html_pages(site):
        for name, attribute in FETCHED.items():
            for tag in parsed(page).find_all(name):
                if tag.get("rel") != ["canonical"]:
                    assert not re.match(r"\w+:|//", str(tag.get(attribute, ""))), tag
        assert not re.search(r"(@import|url\()\s*['\"]?(https?:)?//", page.read_text()), page
    for sheet in site.rglob("*.css"):
        assert not re.search(r"(@import|url\()\s*['\"]?(https?:)?//", sheet.read_text()), sheet


def test_every_picture_has_a_text(site: Path) -> None:
    for page in html_pages(site):
        for picture in parsed(page).find_all("img"):
            assert str(picture.get("alt", "")).strip(), f"{page.name}: {picture}"
        for drawing in parsed(page).find_all("svg", role="img"):
            assert drawing.find("title"), page.name


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=str)
def test_the_pictures_and_their_texts_are_the_stored_ones(site: Path, notebook: Path) -> None:
    stored = [
        output.metadata["image/png"]["alt"]
        for cell in nbformat.read(SOURCE / notebook, as_version=4).cells
        for output in cell.get("outputs", [])
        if "image/png" in output.get("data", {})
    ]
    shown = article(site / notebook.with_suffix(".html")).find_all("img")
    assert [picture["alt"] for picture in shown] == stored


@pytest.mark.parametrize("notebook", LESSONS, ids=str)
def test_answers_are_folded_until_a_reader_opens_them(site: Path, notebook: Path) -> None:
    page = article(site / notebook.with_suffix(".html"))
    questions = [tag for tag in page.find_all("b") if tag.get_text().startswith("Predict: ")]
    answers = page.find_all(string=re.compile(r"^Answer: ", re.M))
    assert len(questions) == len(tasks(SOURCE / notebook).predictions)
    assert sum(text.count("Answer: ") for text in answers) >= len(questions) > 0
    assert all(text.find_parent("details") for text in answers)
    assert not page.find_all("details", attrs={"open": True})
    assert "= predict(" not in page.get_text()


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=str)
def test_controls_that_need_a_kernel_are_told_in_words(site: Path, notebook: Path) -> None:
    text = (SOURCE / notebook).read_text()
    page = article(site / notebook.with_suffix(".html"))
    assert len(page.select(".dead-controls")) == text.count(f'"{CONTROLS}"')
    assert not re.search("Loading widget|Failed to display|Controls, in a", page.get_text())
    assert CONTROLS not in str(page)


def test_tracebacks_are_shown_without_control_characters(site: Path) -> None:
    failed = article(site / "00_start_here.html").select(".traceback")
    assert "WorkerFailed: rank 1 of 4 raised ZeroDivisionError" in failed[0].get_text()
    for page in html_pages(site):
        assert not re.search(r"\x1b|\[0m|\[31m", page.read_text()), page.name


def test_the_reference_has_every_public_name(site: Path) -> None:
    page = parsed(site / "api.html")
    names = [f"ddp_lessons.{name}" for name in ddp_lessons.__all__ if name != "plots"]
    names += [f"ddp_lessons.plots.{name}" for name in plots.__all__]
    for name in (*names, "module-ddp_lessons.plots"):
        assert page.find(id=name) is not None, name


def test_docstrings_are_rendered_not_quoted(site: Path) -> None:
    """No signs of sections, roles, markup or drawings that were not understood."""
    assert not article(site / "api.html").find("blockquote")
    assert not re.search(r"----|``|:\w+:`", article(site / "api.html").get_text())


def test_every_page_says_its_language_and_what_it_is_about(site: Path) -> None:
    for source in (*NOTEBOOKS, *PAGES):
        page = parsed(site / source.with_suffix(".html"))
        assert page.html is not None
        assert page.html["lang"] == "en"
        assert page.title is not None
        assert page.title.get_text().strip()
        assert page.find("meta", attrs={"name": "description"}) is not None, source
        assert page.find("meta", attrs={"name": "viewport"}) is not None
        assert len(page.find_all("h1")) == 1, source


def test_our_style_has_no_fixed_sizes(site: Path) -> None:
    assert not re.search(r"\dpx", (site / "_static" / "site.css").read_text())


def test_nothing_of_the_machine_is_on_the_pages(site: Path) -> None:
    for page in html_pages(site):
        assert not re.search(r"/root/|/home/|/Users/|site-packages", page.read_text()), page.name
