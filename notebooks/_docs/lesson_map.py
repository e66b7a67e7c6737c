"""The map of the course: what builds on what, and its picture for the site and for README.md.

`BUILDS_ON` is the only place that says it. lesson_pages.py puts the picture and the numbers on the
start page; `python notebooks/_docs/lesson_map.py` draws `notebooks/pictures/map.svg` for README.md.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from html import escape
from pathlib import Path
from typing import NamedTuple

from ddp_lessons.course.lesson_files import Lesson, lessons

NOTEBOOKS = Path(__file__).parent.parent
# What a lesson uses, by number. Lessons that it only mentions are not here.
BUILDS_ON = {
    "00": "",
    "01": "00",
    "02": "01",
    "03": "02",
    "03b": "03",
    "04": "03",
    "05": "03",
    "06": "05",
    "07": "04 06",
    "08": "06",
    "09": "08",
    "10": "04 06",
    "10b": "10",
    "11": "07 10",
    "11b": "11",
    "12": "04 08",
    "13": "10 12",
    "14": "08",
    "14b": "14",
    "14c": "14",
    "15": "03b 06",
    "15b": "15",
    "16": "15b",
    "16b": "16",
    "17": "05",
    "17b": "11 12 17",
    "18": "05 10",
    "19": "07 16",
    "20": "09 11 12",
    "real_1": "02 06",
    "real_2": "01 06",
    "real_3": "02 09",
    "real_4": "05 06",
    "real_5": "04 08",
    "gpu": "07 09",
}
# The way through the course, in its order; all others branch off from it, or from each other.
SPINE = [key for key in BUILDS_ON if key < "14"] + ["20"]

TITLE = "Map of the lessons"
TEXT = (
    "Lessons 00 to 13 are one way, from top to bottom, with the capstone, 20, at its end. "
    "03b, 10b and 11b are second halves. To the right, what comes after DDP branches off, to the "
    "left the readings of real code and the GPU appendix: each line leaves from the last lesson "
    "that you need first."
)
HEIGHT, NOTED, GAP = 24, 38, 6  # of a box, of one with a second line, between boxes
BETWEEN = 20  # groups
WIDTH, TOP, BOTTOM = 780, 40, 622
CARD = f'<rect class="card" x="0.5" y="0.5" width="{WIDTH - 1}" height="{BOTTOM + 13}" rx="8"/>'
STYLE = """
svg { font-family: system-ui, -apple-system, "Segoe UI", Helvetica, Arial, sans-serif; }
.card { fill: #ffffff; stroke: #d0d7de; }
text { fill: #1f2328; }
.note, .head { fill: #59636e; }
.box rect { fill: #f6f8fa; stroke: #afb8c1; }
.box.spine rect { fill: #ddebf7; }
.box:is(.spine, .half) rect { stroke: #0072b2; }
path { fill: none; stroke: #8c959f; }
path.way { stroke: #0072b2; }
@media (prefers-color-scheme: dark) {
.card { fill: #0d1117; stroke: #3d444d; }
text { fill: #f0f6fc; }
.note, .head { fill: #9198a1; }
.box rect { fill: #151b23; stroke: #656c76; }
.box.spine rect { fill: #12304a; }
.box:is(.spine, .half) rect { stroke: #56b4e9; }
path { stroke: #656c76; }
path.way { stroke: #56b4e9; }
}
"""


class Box(NamedTuple):
    """A lesson's place in the picture."""

    key: str
    x: float
    y: float
    width: float
    note: str  # its second line

    @property
    def height(self) -> int:
        return NOTED if self.note else HEIGHT

    @property
    def middle(self) -> float:
        return self.y + self.height / 2


def key_of(lesson: Lesson) -> str:
    """By what the map knows a lesson: its number, or the name of the appendix."""
    return lesson.number or lesson.name


def needs(key: str) -> list[str]:
    """The lessons that one builds on."""
    return BUILDS_ON[key].split()


def leaves_at(key: str) -> int:
    """The place on the spine from which one can go on to a lesson."""
    if key in SPINE:
        return SPINE.index(key)
    return max(leaves_at(one) for one in needs(key))


def group_of(key: str) -> str:
    """That of 15 and 15b; the readings, and the appendix, are one each."""
    return re.sub(r"[a-z]$", "", key) if key[0].isdigit() else key


def follows(key: str, above: str) -> bool:
    """Whether a lesson goes on from the one that stands above it."""
    return group_of(above) in {group_of(one) for one in needs(key)}


def column(keys: list[str], x: float, width: float) -> list[Box]:
    """Boxes below each other. Who branches off earlier stands higher, so that no lines cross."""
    boxes: list[Box] = []
    y = 0.0
    for key in sorted(keys, key=lambda key: leaves_at(group_of(key))):
        others = [one for one in needs(key) if group_of(one) != group_of(key)]
        note = f"after {', '.join(others)}" if others else ""
        if boxes:
            y += boxes[-1].height + (GAP if follows(key, boxes[-1].key) else BETWEEN)
        boxes.append(Box(key, x, y, width, note))
    down = TOP + (BOTTOM - TOP - y - boxes[-1].height) / 2  # to the middle of the picture
    return [box._replace(y=box.y + down) for box in boxes]


def way() -> list[Box]:
    """The spine, from top to bottom; second halves stand a little to the right."""
    boxes = []
    for place, key in enumerate(SPINE):
        aside = 18 if key != group_of(key) else 0
        boxes.append(Box(key, 264 + aside, TOP + place * (HEIGHT + GAP), 192 - aside, ""))
    note = f"after {', '.join(needs(SPINE[-1]))}"
    return [*boxes[:-1], boxes[-1]._replace(y=BOTTOM - NOTED, note=note)]


def branches(boxes: list[Box], spine: dict[str, Box]) -> Iterator[str]:
    """The lines to the boxes of a column: from the spine, or from the box above."""
    for above, box in zip([None, *boxes], boxes, strict=False):
        start = spine[SPINE[leaves_at(box.key)]]
        if above and follows(box.key, above.key):
            x = box.x + 14
            yield f"M{x:g} {above.y + above.height:g}V{box.y:g}"
        if start.key in needs(box.key) and box.key == group_of(box.key):
            left = box.x < start.x
            x = start.x if left else start.x + start.width
            end = box.x + box.width if left else box.x
            bend = (x + end) / 2
            yield (
                f"M{x:g} {start.middle:g}C{bend:g} {start.middle:g} "
                f"{bend:g} {box.middle:g} {end:g} {box.middle:g}"
            )


def drawn(box: Box, lesson: Lesson, link: str) -> str:
    """A box with its number and name, linked to its page if that has an address."""
    name = escape(lesson.name.replace("_", " ")) if lesson.number else "appendix"
    parts = [
        f"<title>{escape(lesson.question)}</title>",
        f'<rect x="{box.x:g}" y="{box.y:g}" width="{box.width:g}" height="{box.height}" rx="4"/>',
        f'<text x="{box.x + 8:g}" y="{box.y + 16.5:g}">'
        f'<tspan font-weight="600">{box.key}</tspan> {name}</text>',
    ]
    if box.note:
        place = f'x="{box.x + 8:g}" y="{box.y + 31:g}"'
        parts.append(f'<text class="note" {place} font-size="11">{box.note}</text>')
    kind = "half" if box.key != group_of(box.key) else "spine"
    kind = f"box {kind}" if box.key in SPINE else "box"
    inner = "".join(parts)
    inner = f'<a href="{escape(link)}">{inner}</a>' if link else inner
    return f'<g class="{kind}">{inner}</g>'


def picture(course: list[Lesson], link: Callable[[Lesson], str] | None = None) -> str:
    """The map as SVG: a file that stands alone, or, with links, a part of a page with a style."""
    by_key = {key_of(lesson): lesson for lesson in course}
    centre = way()
    left = column([key for key in BUILDS_ON if not key[0].isdigit()], 12, 184)
    right = column([key for key in BUILDS_ON if key[0].isdigit() and key not in SPINE], 536, 232)
    spine = {box.key: box for box in centre}
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {BOTTOM + 14}" '
        f'font-size="12.5" role="{"group" if link else "img"}" '
        'aria-labelledby="map-title map-text">',
        f'<title id="map-title">{TITLE}</title><desc id="map-text">{TEXT}</desc>',
        "" if link else f"<style>{STYLE}</style>{CARD}",
    ]
    for x, head in ((104, "reading real code"), (360, "the course"), (652, "after DDP")):
        parts.append(f'<text class="head" x="{x}" y="26" text-anchor="middle">{head}</text>')
    parts.append(f'<path class="way" stroke-width="3" d="M278 {TOP + 10}V{BOTTOM - 10}"/>')
    for line in (*branches(left, spine), *branches(right, spine)):
        parts.append(f'<path stroke-width="1.5" d="{line}"/>')
    for box in (*left, *centre, *right):
        lesson = by_key[box.key]
        parts.append(drawn(box, lesson, link(lesson) if link else ""))
    return "\n".join([*parts, "</svg>\n"])


if __name__ == "__main__":
    (NOTEBOOKS / "pictures" / "map.svg").write_text(picture(lessons(NOTEBOOKS)), encoding="utf-8")
