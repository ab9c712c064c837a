"""The documents show what the commands print, where that depends on neither machine nor build."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from fa4_ext.__main__ import main

ROOT = Path(__file__).parent.parent
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SHOWN = re.compile(
    r"^```\w*\n\$ python -m fa4_ext ((?:explain|kernels|bench --from) .*)\n((?:.*\n)*?)```$",
    re.MULTILINE,
)
BLOCKS = [
    pytest.param(*match, id=f"{path.name}: {match[0]}")
    for path in DOCUMENTS
    for match in SHOWN.findall(path.read_text())
]


def test_there_are_some():
    assert len(BLOCKS) >= 3, BLOCKS


@pytest.mark.parametrize(("command", "shown"), BLOCKS)
def test_a_document_shows_what_a_command_prints(command, shown, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert main(shlex.split(command)) == 0
    pattern = "".join(
        r"(.*\n)+" if line == "..." else re.escape(f"{line}\n") for line in shown.splitlines()
    )
    printed = capsys.readouterr().out
    assert re.fullmatch(pattern, printed), f"{command} prints\n{printed}"
