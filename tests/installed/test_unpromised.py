"""A torch without the private names that the package uses: no import fails, CUDA comes up, and a
warning says what is lost."""

from __future__ import annotations

import pytest
from processes import run

from fa4_ext import _environment, _sdpa_order

OURS = "'registered at fa4_ext:' in dump('aten::_flash_attention_forward')"
CUT = """
import operator, torch, torch.library
dump = torch._C._dispatch_dump
name = {name!r}
where, _, last = name.removeprefix("torch.").rpartition(".")
owner = operator.attrgetter(where)(torch) if where else torch
"""
DELETE = """
if name == "torch.ops.aten._fused_sdp_choice":
    owner.__dict__.pop(last, None)
    lookup = type(owner).__getattr__
    def without(self, op):
        if op == last:
            raise AttributeError(op)
        return lookup(self, op)
    type(owner).__getattr__ = without
else:
    delattr(owner, last)
"""
# torch's own two look for devices.
START_CUDA = "for call, _ in torch.cuda._queued_calls[2:]: call()\n"
IMPORT = """
import warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import fa4_ext
import_said = [str(warning.message) for warning in caught if "fa4_ext" in str(warning.message)]
assert {w.filename for w in caught if str(w.message) in import_said} <= {"<string>"}
"""


# Nobody can take it away from torch's own type.
CANNOT_GO = "torch.Tensor._make_wrapper_subclass"


@pytest.mark.parametrize("name", [name for name in _sdpa_order._NEEDED if name != CANNOT_GO])
def test_a_torch_without_an_order_to_change_is_as_with_prefer_false(name):
    run(
        CUT.format(name=name)
        + DELETE
        + IMPORT
        + f"""
(sentence,) = import_said
assert sentence.startswith("fa4_ext: torch "), sentence
assert f"has no {{name}}" in sentence and "prefer=False" in sentence, sentence
assert {OURS} and fa4_ext.default_handle.active and fa4_ext.default_handle.prefer is False
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    handle = fa4_ext.register()
# Beside it there may be one of a driver that is not there.
(warning,) = [one for one in caught if f"has no {{name}}" in str(one.message)]
assert warning.category is RuntimeWarning and warning.filename == "<string>"
assert handle.prefer is False and handle.active
with warnings.catch_warnings():
    warnings.simplefilter("error")
    fa4_ext.register(prefer=False).remove()  # asks for nothing that is not there
    try:
        fa4_ext.register()
    except RuntimeWarning:
        pass
    else:
        raise AssertionError("no warning")
assert fa4_ext._register._live == [fa4_ext.default_handle, handle]
{START_CUDA}
handle.remove()
fa4_ext.default_handle.remove()
assert not {OURS}
"""
    )


@pytest.mark.parametrize(
    ("name", "cut", "filters"),
    [
        ("torch._C._get_sdp_priority_order", DELETE, "always"),
        ("torch._C._get_sdp_priority_order", "setattr(owner, last, lambda: None)\n", "always"),
        ("torch._C._set_sdp_priority_order", "setattr(owner, last, lambda: None)\n", "error"),
    ],
    ids=["gone", "returns something else", "takes something else, and warnings are errors"],
)
def test_a_name_that_fails_once_cuda_comes_up_fails_no_use_of_cuda(name, cut, filters):
    """A later torch may change what it takes or returns."""
    run(
        CUT.format(name=name)
        + "import warnings, fa4_ext\nassert fa4_ext.default_handle.prefer\n"
        + cut
        + f"""
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter({filters!r})
    {START_CUDA}
said = [str(warning.message) for warning in caught]
if {filters!r} != "error":
    assert "putting flash attention first failed" in said[0] and "prefer=False" in said[0], said
fa4_ext.default_handle.remove()
assert not {OURS}
"""
    )


@pytest.mark.parametrize("name", ["torch._C._dispatch_dump", "torch.library.get_kernel"])
def test_a_torch_that_shows_its_dispatcher_no_more_registers_all_the_same(name):
    run(
        CUT.format(name=name)
        + DELETE
        + IMPORT
        + f"""
assert import_said == [], import_said
with fa4_ext.register():
    assert {OURS}
fa4_ext.default_handle.remove()
assert not {OURS}
import contextlib, io
from fa4_ext import _dispatcher, _doctor
if name == "torch._C._dispatch_dump":
    assert "does not show" in _dispatcher.entry("_flash_attention_forward")
    with fa4_ext.register():
        checks = _doctor.examine(gpu=False).checks
    (check,) = [check for check in checks if check.name == "registration"]
    assert check.status == _doctor.NOTE and "does not show" in check.sentence, check
"""
    )


@pytest.mark.parametrize(
    "change",
    [
        "attention.register_flash_attention_impl = lambda name, *, register: None",
        "del attention.list_flash_attention_impls, attention.register_flash_attention_impl",
    ],
    ids=["of other arguments", "gone"],
)
def test_a_registry_of_providers_that_is_other_or_gone_fails_no_import(change):
    told = (
        "assert 'registry does not take FA4_EXT' in import_said[0] and len(import_said) == 1, "
        "import_said"
    )
    expected = told if "lambda" in change else "assert import_said == [], import_said"
    run(
        f"""
import torch
from torch.nn import attention
dump = torch._C._dispatch_dump
{change}
{IMPORT}
{expected}
assert {OURS} and fa4_ext.default_handle.active
"""
    )


@pytest.mark.parametrize("version", ["nightly", "", "v2"])
def test_a_version_without_numbers_is_taken_for_a_new_one(version):
    assert _environment.torch_too_old(version) is None


def test_a_torch_that_shows_no_schema_is_looked_at_when_it_calls():
    run(
        """
        import torch
        from types import SimpleNamespace

        torch.ops.aten._flash_attention_forward = SimpleNamespace(default=object())
        torch.ops.aten._flash_attention_backward = SimpleNamespace()
        import fa4_ext
        assert fa4_ext.default_handle.active
        """
    )


def test_a_torch_whose_ops_have_more_results_is_too_new():
    said = run(
        """
        import torch
        from types import SimpleNamespace

        schema = torch.ops.aten._flash_attention_backward.default._schema
        more = SimpleNamespace(arguments=schema.arguments, returns=[*schema.returns, None])
        changed = SimpleNamespace(default=SimpleNamespace(_schema=more))
        torch.ops.aten._flash_attention_backward = changed
        import fa4_ext
        assert fa4_ext.default_handle is None
        """
    ).stderr
    assert (
        "has 4 results for _flash_attention_backward, fa4_ext knows 3: it needs a newer fa4_ext"
        in said
    ), said
