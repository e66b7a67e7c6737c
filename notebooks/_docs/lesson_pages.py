"""What the site adds to the stored notebooks: texts of pictures, words where controls would be.

A Sphinx extension, loaded by conf.py.
"""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import sys
from binascii import a2b_base64
from pathlib import Path
from typing import Any

import nbformat
from docutils import nodes
from docutils.statemachine import StringList
from lesson_map import key_of, needs, picture
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.transforms import SphinxTransform
from sphinx.util.docutils import SphinxDirective, SphinxRole

from ddp_lessons.course.lesson_files import Lesson, lessons

CONTROLS = "Controls, in a running notebook: "  # the text of an explorer's sliders
DEAD_CONTROLS = (
    "Here a running notebook has controls ({}). Each move of one launches real ranks. "
    "The picture is that of their first setting."
)


class LessonTable(SphinxDirective):
    """`{lesson-table}`: every lesson with its question, its minutes and what it builds on."""

    def run(self) -> list[nodes.Node]:
        """A table in Markdown, parsed in place."""
        folder = Path(self.env.srcdir)
        rows = ["| lesson | the question | minutes | builds on |", "| --- | --- | ---: | --- |"]
        for one in lessons(folder):
            self.env.note_dependency(str(folder / one.file))
            name = f"{one.number} {one.name}".strip()
            before = ", ".join(needs(key_of(one)))
            rows.append(f"| [{name}]({one.file}) | {one.question} | {one.minutes} | {before} |")
        node = nodes.container(classes=["lesson-table"])
        self.state.nested_parse(StringList(rows, source=self.env.docname), 0, node)
        return [node]


class LessonMap(SphinxDirective):
    """`{lesson-map}`: the picture of what builds on what, each lesson a link."""

    def run(self) -> list[nodes.Node]:
        """SVG in the page, so that its colours follow the theme."""
        folder = Path(self.env.srcdir)
        course = lessons(folder)
        for one in course:
            self.env.note_dependency(str(folder / one.file))
        svg = picture(course, link=self._page)
        return [nodes.raw("", f'<div class="drawing lesson-map">{svg}</div>', format="html")]

    def _page(self, lesson: Lesson) -> str:
        builder = self.env.app.builder
        return builder.get_relative_uri(self.env.docname, Path(lesson.file).stem)


class CommandHelp(SphinxDirective):
    """`{command-help} export`: what the command `ddp-lessons export --help` prints."""

    optional_arguments = 1
    final_argument_whitespace = True

    def run(self) -> list[nodes.Node]:
        """A block of text."""
        command = [*(self.arguments[0].split() if self.arguments else []), "--help"]
        code = f"from ddp_lessons.cli import main; main({command!r})"
        done = subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            check=True,
            env={**os.environ, "COLUMNS": "80", "PYTHONPATH": os.pathsep.join(sys.path)},
        )
        text = f"$ ddp-lessons {' '.join(command)}\n{done.stdout}"
        return [nodes.literal_block(text, text, language="text")]


class HeldBy(SphinxRole):
    """`{held-by}`: the test files that hold a promise; each must exist."""

    def run(self) -> tuple[list[nodes.Node], list[nodes.system_message]]:
        """Their names, as a small note."""
        tests = Path(self.env.srcdir).parent / "tests"
        for name in self.text.split():
            if not (tests / f"{name}.py").exists():
                raise ValueError(f"held-by names {name}.py, which is not in tests/")
        names = [f"tests/{name}.py" for name in self.text.split()]
        literals = [nodes.literal(name, name) for name in names]
        note = nodes.inline("", "Held by ", classes=["held-by"])
        for number, one in enumerate(literals):
            note += [nodes.Text(", "), one] if number else [one]
        return [note], []


class StoredOutputs(SphinxTransform):
    """Give pictures their texts, and say what a page without a kernel cannot do."""

    default_priority = 400

    def apply(self, **kwargs: Any) -> None:
        """Change the document of a notebook in place."""
        path = Path(self.env.doc2path(self.env.docname))
        if path.suffix != ".ipynb":
            return
        self._describe(picture_texts(path))
        self._mend_blocks()
        self._drop_code_of_predictions()
        self._offer(path)

    def _describe(self, texts: dict[str, str]) -> None:
        for image in self.document.findall(nodes.image):
            text = texts.get(Path(image["uri"]).stem)
            if text:
                image["alt"] = text

    def _mend_blocks(self) -> None:
        for block in list(self.document.findall(nodes.literal_block)):
            if block.get("language") == "python":
                block["language"] = "ipython3"  # `!torchrun ...` is no Python
            if block.astext().startswith(CONTROLS):
                names = block.astext().removeprefix(CONTROLS).strip()
                text = DEAD_CONTROLS.format(names)
                sentence = nodes.paragraph(text, text, classes=["dead-controls"])
                block.parent.replace(block, sentence)

    def _drop_code_of_predictions(self) -> None:
        """What the code asks stands below it, as its output."""
        for block in list(self.document.findall(nodes.literal_block)):
            if re.match(r"\w+ = predict\(", block.astext()):
                block.parent.parent.remove(block.parent)

    def _offer(self, path: Path) -> None:
        section = next(iter(self.document.findall(nodes.section)))
        link = addnodes.download_reference(
            "", "", nodes.Text(path.name), reftarget=path.name, refdoc=self.env.docname
        )
        line = nodes.paragraph("", "These are the outputs of a real run. The notebook: ", link)
        line["classes"].append("stored-outputs")
        section.insert(_place_under_minutes(section), line)


def _place_under_minutes(section: nodes.section) -> int:
    """Behind the line with the minutes, or else behind the title."""
    for place, child in enumerate(section.children[:4]):
        if re.match(r"\d+ minutes", child.astext()):
            return place + 1
    return 1


def picture_texts(path: Path) -> dict[str, str]:
    """The text of each stored picture, by the hash that myst-nb names its file after."""
    texts = {}
    for cell in nbformat.read(path, as_version=4).cells:
        for output in cell.get("outputs", []):
            if picture := output.get("data", {}).get("image/png"):
                name = hashlib.sha256(a2b_base64(picture)).hexdigest()
                texts[name] = output.metadata["image/png"]["alt"]
    return texts


def setup(app: Sphinx) -> dict[str, bool]:
    """Called by Sphinx."""
    app.add_directive("lesson-table", LessonTable)
    app.add_directive("lesson-map", LessonMap)
    app.add_directive("command-help", CommandHelp)
    app.add_role("held-by", HeldBy())
    app.add_transform(StoredOutputs)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
