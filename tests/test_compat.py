"""scripts/tools/compat.py: what it makes of a report, and where it writes the table. Whole environments
are `make compat`'s business."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from scripts.tools import compat

REPORT = """<testsuites><testsuite>
<testcase classname="tests.test_a" name="test_passes"/>
<testcase classname="tests.test_a" name="test_skips"><skipped message="no"/></testcase>
<testcase classname="tests.test_a" name="test_fails"><failure message="assert">1 == 2</failure></testcase>
<testcase classname="tests.test_b" name="test_errs"><error message="error">no fixture</error></testcase>
</testsuite></testsuites>"""
WHEEL = Path("fa4_ext-0.1.0-py3-none-manylinux_2_28_x86_64.whl")
INSTALLED = {
    "torch": "2.15.0",
    "cuda": "13.2",
    "cudnn": 92600,
    "python": "3.12.1",
    "kernels": 384,
    "commit": "f710213",
}


def test_report_is_added_up_and_failures_keep_their_names():
    result = compat.Result("2.15.0", "python3.12")
    compat.count(REPORT, result)
    assert (result.passed, result.skipped) == (1, 1)
    assert result.failures == [
        "tests.test_a::test_fails\n    1 == 2",
        "tests.test_b::test_errs\n    no fixture",
    ]


def test_report_without_a_test_is_a_failure():
    result = compat.Result("2.15.0", "python3.12")
    compat.count("<testsuites><testsuite/></testsuites>", result)
    assert result.failures == ["no test ran"]


def test_table_replaces_what_is_between_the_marks():
    results = [
        compat.Result(
            "2.15.0",
            "python3.12",
            INSTALLED,
            passed=224,
            skipped=11,
            install_seconds=60.4,
            test_seconds=50.6,
        ),
        compat.Result("2.16.0", "python3.12", failures=["pip exited with 1"]),
    ]
    text = compat.replace(
        f"before\n{compat.BEGIN} -->\nold\n{compat.END}\nafter\n", compat.table(results, WHEEL)
    )
    assert text.startswith(f"before\n{compat.BEGIN} -->\n| torch | CUDA |") and text.endswith(
        f"\n{compat.END}\nafter\n"
    )
    assert "| 2.15.0 | 13.2 | 9.26.0 | 3.12.1 | 224 | 0 | 11 | 60 s | 51 s |" in text
    assert "| 2.16.0 | ? | ? | python3.12 | 0 | 1 | 0 | 0 s | 0 s |" in text
    assert f"{WHEEL}, 384 kernels, commit f710213, " in text and "old" not in text


def test_table_without_marks_to_go_between_is_refused():
    with pytest.raises(SystemExit, match="needs a line that begins with"):
        compat.replace("no marks", "table")


def test_missing_interpreter_is_named_before_anything_is_installed():
    with pytest.raises(SystemExit, match=r"no interpreter python3\.999"):
        compat.combinations(["2.15.0"], [sys.executable, "python3.999"])


def test_step_that_fails_says_what_it_printed(tmp_path):
    with pytest.raises(compat.StepFailed, match="exited with 3\n    the reason"):
        compat.run(sys.executable, "-c", "print('the reason'); raise SystemExit(3)", cwd=tmp_path)
