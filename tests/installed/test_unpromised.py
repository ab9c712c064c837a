"""A torch without the private names that the package uses: no import fails, and a warning says what
is lost."""

from __future__ import annotations

import pytest
from processes import run

from fa4_ext import _environment

OURS = "'registered at fa4_ext:' in dump('aten::_flash_attention_forward')"
CUT = """
import operator, torch, torch.library
dump = torch._C._dispatch_dump
name = {name!r}
where, _, last = name.removeprefix("torch.").rpartition(".")
owner = operator.attrgetter(where)(torch)
"""
DELETE = "delattr(owner, last)\n"
IMPORT = """
import warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import fa4_ext
import_said = [str(warning.message) for warning in caught if "fa4_ext" in str(warning.message)]
assert {w.filename for w in caught if str(w.message) in import_said} <= {"<string>"}
"""


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


def test_a_registry_that_cannot_be_put_back_provides_no_other_name():
    name = "torch.nn.attention._registry._FLASH_ATTENTION_IMPLS"
    run(
        CUT.format(name=name).replace("torch.library", "torch.nn.attention")
        + DELETE
        + IMPORT
        + f"""
assert any(f"has no {{name}}" in sentence for sentence in import_said), import_said
assert {OURS} and fa4_ext.default_handle.provides == ()
try:
    fa4_ext.register(provides=("FA3",))
except RuntimeError as error:
    assert f"has no {{name}}" in str(error), error
else:
    raise AssertionError("no error")
assert fa4_ext._register._live == [fa4_ext.default_handle]
fa4_ext.register().remove()
fa4_ext.default_handle.remove()
assert not {OURS}
""",
        FA4_EXT_PROVIDES="FA3",
    )


def test_a_torch_that_does_not_tell_its_order_of_backends_is_examined():
    name = "torch._C._get_sdp_priority_order"
    run(
        CUT.format(name=name)
        + DELETE
        + IMPORT
        + f"""
assert import_said == [] and {OURS}, import_said
from fa4_ext import _doctor
(check,) = [check for check in _doctor.examine(gpu=False).checks if check.name == "sdpa"]
assert check.status == _doctor.OK, check
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
