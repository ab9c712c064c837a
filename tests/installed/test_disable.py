"""register(disable=...) and FA4_EXT_DISABLE leave kernels out while their registration is in
force."""

from __future__ import annotations

import json

import pytest
import torch
from processes import python, run

import fa4_ext
from fa4_ext import _disable, _library

pytestmark = pytest.mark.usefixtures("unregistered")

ARCH = fa4_ext.build_info()["archs"][0]
CAPABILITY = {90: (9, 0), 100: (10, 0)}[ARCH]
FORWARD = f"sm{ARCH}_forward_*"
ALL = f"sm{ARCH}_*"
IMPORT = "import fa4_ext; print(fa4_ext.default_handle)"


def explanation(backward: bool = False) -> fa4_ext.Explanation:
    query = torch.empty(2, 8, 4096, 128, dtype=torch.bfloat16, device="meta")
    return fa4_ext.explain(
        query, query, query, backward=backward, deterministic=False, device_capability=CAPABILITY
    )


def test_the_newest_live_handle_s_kernels_are_left_out_until_it_is_removed():
    free = explanation()
    assert free.supported, free
    with fa4_ext.register(disable=(free.kernel,)) as one:
        assert one.disable == (free.kernel,) and f"disable=({free.kernel!r},)" in repr(one)
        assert explanation().kernel != free.kernel
        with fa4_ext.register(disable=[ALL, ALL]) as every:
            assert every.disable == (ALL,)
            left = explanation()
            assert left.reason == (
                f"kernel {free.kernel} is disabled (FA4_EXT_DISABLE or register(disable=...))"
            )
            assert not left.supported and left.fallback in ("flash", "cudnn")
            with fa4_ext.register(disable=()):
                assert explanation() == free
            assert explanation() == left
        assert explanation().kernel != free.kernel
    assert explanation() == free


def test_a_backward_goes_with_a_kernel_that_it_is_launched_with():
    free = explanation(backward=True)
    (row,) = (row for row in _library.manifest() if row["name"] == free.kernel)
    assert row["companions"], row
    for companion in row["companions"]:
        with fa4_ext.register(disable=(companion, f"sm{ARCH}_backward_*_gqa_*")):
            assert explanation(backward=True).kernel != free.kernel, companion
            assert explanation().supported


@pytest.mark.parametrize(
    ("disable", "message"),
    [
        ("sm90_*", "disable must be a tuple of kernels' names, or patterns .* got 'sm90_\\*'"),
        ((3,), r"disable must be a tuple .* got \(3,\)"),
        (("a b",), r"without spaces or commas, got \('a b',\)"),
        (("",), r"disable must be a tuple .* got \(''"),
        (
            (ALL, "sm80_*"),
            r"disable names 'sm80_\*', which no kernel of this build matches: `python -m fa4_ext "
            "kernels` lists their names",
        ),
    ],
)
def test_a_wrong_argument_is_named_with_what_is_allowed(disable, message):
    with pytest.raises(ValueError, match=message):
        fa4_ext.register(disable=disable)


def test_the_library_refuses_what_matches_nothing_and_keeps_what_was_in_force():
    with fa4_ext.register(disable=(ALL,)):
        with pytest.raises(RuntimeError, match="no kernel of this build matches sm80_x, which"):
            _library.disable((FORWARD, "sm80_x"))
        assert not explanation(backward=True).supported


@pytest.mark.parametrize(
    ("value", "patterns"),
    [
        (None, ()),
        (" , ", ()),
        (f"{ALL}", (ALL,)),
        (f" {FORWARD},{ALL}  {ALL}\n", (FORWARD, ALL)),
    ],
)
def test_the_variable_s_patterns_are_separated_by_commas_or_spaces(value, patterns):
    assert _disable.from_environment(value) == (patterns, None)


def test_the_import_warns_of_a_pattern_without_kernels_and_honours_the_rest():
    result = python("-c", IMPORT, FA4_EXT_DISABLE=f"sm80_*,{FORWARD}")
    assert result.returncode == 0, result.stderr
    assert f"disable=({FORWARD!r},)" in result.stdout
    assert (
        "RuntimeWarning: FA4_EXT_DISABLE names 'sm80_*', which no kernel of this build matches: "
        "`python -m fa4_ext kernels` lists their names." in result.stderr
    )


def test_the_variable_is_what_register_leaves_out_by_default():
    run(
        f"""
        import fa4_ext
        assert fa4_ext.default_handle.disable == ({FORWARD!r},)
        assert fa4_ext.register(fallback="error").disable == ({FORWARD!r},)
        assert fa4_ext.register(disable=()).disable == ()
        """,
        FA4_EXT_DISABLE=FORWARD,
    )


def test_the_commands_show_the_variable_and_follow_it():
    shape = ("--q", "2x8x4096x128", "--device", f"sm{ARCH}", "--json")
    result = python("-m", "fa4_ext", "explain", *shape, FA4_EXT_DISABLE=ALL)
    assert "is disabled (FA4_EXT_DISABLE" in json.loads(result.stdout)["forward"]["reason"]
    result = python("-m", "fa4_ext", "doctor", "--no-gpu", FA4_EXT_DISABLE=ALL)
    assert f"FA4_EXT_DISABLE={ALL}" in result.stdout, result.stdout
    result = python("-m", "fa4_ext", "status", FA4_EXT_DISABLE=ALL)
    assert f"disable=('{ALL}',)" in result.stdout, result.stdout


def test_torch_s_registry_activates_with_the_handle_s_kernels_left_out():
    from torch.nn import attention

    with fa4_ext.register(provides=("FA3",), disable=(ALL,)):
        pass
    handle = fa4_ext.register(provides=("FA3",), disable=(ALL,))
    attention.activate_flash_attention_impl("FA3")
    handle.remove()
    assert not explanation().supported
    attention.restore_flash_attention_impl()


def test_the_environment_s_kernels_are_left_out_without_a_registration():
    """This library's own ops run without one."""
    run(
        f"""
        import fa4_ext
        from fa4_ext import _library
        assert fa4_ext.default_handle is None
        assert _library.disabled_kernels() == ({FORWARD!r},)
        with fa4_ext.register(disable=()):
            assert _library.disabled_kernels() == ()
        assert _library.disabled_kernels() == ({FORWARD!r},)
        """,
        "-W", "ignore",
        FA4_EXT_AUTOREGISTER="0",
        FA4_EXT_DISABLE=FORWARD,
    )  # fmt: skip
