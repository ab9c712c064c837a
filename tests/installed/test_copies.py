"""A second copy of the library, or its name taken by something else: the library refuses with the
reason, and nothing crashes."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from packages import copy_package, preamble
from processes import run

import fa4_ext

LIBRARY = Path(fa4_ext.__file__).with_name("libfa4_ext.so")
OURS = "'registered at fa4_ext:' in torch._C._dispatch_dump('aten::_flash_attention_forward')"
REFUSES = "PyTorch refused to define the operators fa4_ext::*"

TAKEN = {
    "by a library of that name": "taken = torch.library.Library('fa4_ext', 'DEF')",
    "by an op of that name": "taken = torch.library.Library('fa4_ext', 'FRAGMENT'); "
    "taken.define('explain(Tensor x) -> Tensor')",
}
IMPORT = """
import warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import fa4_ext
caught = [str(warning.message) for warning in caught if warning.category is RuntimeWarning]
"""
REFUSED = """
(sentence,) = caught
assert fa4_ext.default_handle is None
for use in (fa4_ext.register, fa4_ext.kernels):
    try:
        use()
    except RuntimeError as error:
        assert str(error) == sentence, error
    else:
        raise AssertionError(use)
print(sentence)
"""


@pytest.mark.parametrize("taken", TAKEN.values(), ids=TAKEN)
@pytest.mark.parametrize("autoregister", ["", "0"])
def test_where_the_name_is_taken_the_import_warns_and_goes_on(taken, autoregister):
    code = f"import torch\n{taken}\n" + IMPORT + REFUSED + f"assert not {OURS}"
    sentence = run(code, FA4_EXT_AUTOREGISTER=autoregister).stdout
    assert REFUSES in sentence and "has defined them in this process" in sentence, sentence


def test_where_the_name_is_taken_what_was_defined_before_stays():
    run(
        "import torch\n"
        + TAKEN["by an op of that name"]
        + """
taken.impl("explain", lambda x: x + 1, "CompositeExplicitAutograd")
import fa4_ext
assert torch.ops.fa4_ext.explain(torch.zeros(2)).tolist() == [1.0, 1.0]
"""
    )


LOAD = """
import ctypes
def load(path):
    library = ctypes.CDLL(path)
    library.fa4_ext_last_error.restype = library.fa4_ext_problem.restype = ctypes.c_char_p
    return library
"""


def test_a_second_copy_of_the_library_refuses_and_the_first_works_on(tmp_path):
    copy = shutil.copy(LIBRARY, tmp_path)
    code = f"""
import torch, fa4_ext
first, second = load(fa4_ext._library.PATH), load({str(copy)!r})
assert first.fa4_ext_problem() == b"", first.fa4_ext_problem()
fa4_ext.default_handle.remove()
assert second.fa4_ext_register() == 1 and not {OURS}
assert second.fa4_ext_last_error() == second.fa4_ext_problem()
second.fa4_ext_remove()
with fa4_ext.register():
    assert {OURS}
    second.fa4_ext_remove()
    assert {OURS}
assert not {OURS}
query = torch.empty(1, 2, 128, 64, dtype=torch.bfloat16, device="meta")
fa4_ext.explain(query, query, query, device_capability=(9, 0))
print(second.fa4_ext_problem().decode())
"""
    text = run(LOAD + code).stdout
    assert REFUSES in text and str(copy) in text, text


def test_a_second_copy_of_the_package_warns_and_the_first_works_on(tmp_path):
    copy_package(tmp_path)
    code = f"""
import torch, sys
import fa4_ext as first
for name in [name for name in sys.modules if name.partition(".")[0] == "fa4_ext"]:
    del sys.modules[name]
{preamble(tmp_path)}
"""
    after = f"""
assert fa4_ext is not first and fa4_ext.__file__.startswith({str(tmp_path)!r})
assert first.default_handle.active and {OURS}
torch.nn.attention.activate_flash_attention_impl("FA4_EXT")  # the first one's still
torch.nn.attention.restore_flash_attention_impl()
first.default_handle.remove()
assert not {OURS}
"""
    assert REFUSES in run(code + IMPORT + REFUSED + after).stdout
