"""This module lays out text for terminals and JSON for programs."""

from __future__ import annotations

import json
import textwrap

WIDTH = 100


def json_text(value) -> str:
    return json.dumps(value, indent=1)


def labelled(rows: list[tuple[str, str]], indent: str = "") -> list[str]:
    """Returns the lines of labels and texts in two columns; a long text takes several lines."""
    width = max(len(label) for label, _ in rows)
    return [line for label, text in rows for line in _wrapped(f"{indent}{label:{width}}  ", text)]


def _wrapped(head: str, text: str) -> list[str]:
    return textwrap.wrap(
        text,
        WIDTH,
        initial_indent=head,
        subsequent_indent=" " * len(head),
        break_long_words=False,
        break_on_hyphens=False,
    )


def readable_bytes(count: int) -> str:
    size, unit = float(count), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if size < 1024:
            break
        size, unit = size / 1024, larger
    return f"{count} B" if unit == "B" else f"{size:.1f} {unit}"
