"""The documents are within their width, and each ends with a newline."""

from __future__ import annotations

from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
WIDTH = 120
DOCUMENTS = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "CHANGELOG.md",
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "examples").glob("*/README.md")),
]


def prose(text: str) -> list[tuple[int, str]]:
    """Returns the numbered lines that can be broken: those of no code block, table or image, of
    more than one word."""
    found, in_code = [], False
    for number, line in enumerate(text.splitlines(), start=1):
        if line.lstrip().startswith("```"):
            in_code = not in_code
        elif not in_code and not line.startswith(("|", "![")) and len(line.split()) > 1:
            found.append((number, line))
    return found


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_document_is_within_its_width_and_ends_with_a_newline(path):
    text = path.read_text()
    too_long = [number for number, line in prose(text) if len(line) > WIDTH]
    assert not too_long, f"lines of more than {WIDTH} columns: {too_long}"
    assert text.endswith("\n") and not text.endswith("\n\n")


def test_only_prose_is_held_to_the_width():
    long = "a word " * 20
    table, code = f"| {long} |", f"```\n{long}\n```"
    image, link = f"![{long}](figure.png)", f"<https://example.com/{'x' * 120}>"
    assert prose("\n".join((table, code, image, link))) == []
    assert prose(f"{code}\n- {long}") == [(4, f"- {long}")]
