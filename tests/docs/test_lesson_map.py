"""The map of the lessons: it has all of them, has no circle, and README.md shows it as it is."""

from __future__ import annotations

import runpy
from graphlib import TopologicalSorter
from xml.etree import ElementTree

import pytest

from ddp_lessons.course.lesson_files import lessons
from tests.support.checkout import ROOT

SCRIPT = "notebooks/_docs/lesson_map.py"
MAP = runpy.run_path(str(ROOT / SCRIPT))
COURSE = lessons(ROOT / "notebooks")
BUILDS_ON = {key: MAP["needs"](key) for key in MAP["BUILDS_ON"]}
SVG = "{http://www.w3.org/2000/svg}"


def test_every_lesson_is_on_it_and_nothing_else() -> None:
    assert sorted(BUILDS_ON) == sorted(MAP["key_of"](lesson) for lesson in COURSE)


def test_lessons_build_on_lessons_that_exist_and_in_no_circle() -> None:
    assert {one for before in BUILDS_ON.values() for one in before} <= {*BUILDS_ON}
    assert [key for key, before in BUILDS_ON.items() if not before] == ["00"]
    assert len([*TopologicalSorter(BUILDS_ON).static_order()]) == len(COURSE)


def test_the_way_through_the_course_passes_nothing_too_early() -> None:
    seen: set[str] = set()
    for key in MAP["SPINE"]:
        assert {*BUILDS_ON[key]} <= seen, key
        seen.add(key)
    assert MAP["SPINE"][-1] == "20"


def test_the_picture_of_the_readme_is_what_the_script_draws() -> None:
    stored = (ROOT / "notebooks" / "pictures" / "map.svg").read_text(encoding="utf-8")
    assert stored == MAP["picture"](COURSE), f"run: python {SCRIPT}"
    assert "](notebooks/pictures/map.svg)" in (ROOT / "README.md").read_text(encoding="utf-8")


def test_every_lesson_has_one_box_and_boxes_lie_apart() -> None:
    drawing = ElementTree.fromstring(MAP["picture"](COURSE))
    boxes = [one for one in drawing.iter(f"{SVG}g") if "box" in one.get("class", "")]
    assert sorted(number_in(box) for box in boxes) == sorted(BUILDS_ON)
    places = [place_of(box) for box in boxes]
    for one, (left, top, right, bottom) in enumerate(places):
        assert 0 < left < right < 780
        for other in places[one + 1 :]:
            assert right < other[0] or other[2] < left or bottom < other[1] or other[3] < top


def number_in(box: ElementTree.Element) -> str:
    return next(box.iter(f"{SVG}tspan")).text or ""


def place_of(box: ElementTree.Element) -> tuple[float, float, float, float]:
    rect = next(box.iter(f"{SVG}rect"))
    x, y, width, height = (float(rect.get(name, "")) for name in ("x", "y", "width", "height"))
    return x, y, x + width, y + height


@pytest.mark.parametrize("link", [None, lambda lesson: f"{lesson.file}?a&b"], ids=["file", "page"])
def test_it_is_well_formed_and_says_what_it_shows(link: object) -> None:
    drawing = ElementTree.fromstring(MAP["picture"](COURSE, link))
    assert drawing.findtext(f"{SVG}title")
    assert "capstone" in drawing.findtext(f"{SVG}desc", "")
    assert len([*drawing.iter(f"{SVG}a")]) == (len(COURSE) if link else 0)
