"""What `import fa4_ext` does to a process: a registration, and nothing else that anyone could
notice."""

from __future__ import annotations

import pytest
from processes import python, run

IMPORT = "import torch\nimport fa4_ext\n"
OURS = "'registered at fa4_ext:' in torch._C._dispatch_dump('aten::_flash_attention_forward')"
# This overrides one op in Python first, so that ours is the process's first override of a kernel.
PYTHON_OVERRIDE = """
import torch
library = torch.library.Library("aten", "IMPL")
library.impl("_flash_attention_forward", lambda *args, **kwargs: None, "CUDA")
"""


def test_import_prints_nothing():
    bare = run("import torch", "-W", "always")
    ours = run(IMPORT, "-W", "always")
    assert ours.stdout == ""
    # torch itself may warn, about a missing NumPy for example.
    assert ours.stderr == bare.stderr


def test_import_registers():
    run(IMPORT + f"assert {OURS} and fa4_ext.default_handle.active")


def test_import_with_autoregister_0_only_loads():
    run(
        IMPORT + f"assert not {OURS} and fa4_ext.default_handle is None and fa4_ext.kernels()",
        FA4_EXT_AUTOREGISTER="0",
    )


@pytest.mark.parametrize(
    ("value", "registers"), [("False", False), (" OFF ", False), ("yes", True)]
)
def test_the_setting_decides_silently(value, registers):
    bare = run("import torch", "-W", "always")
    ours = run(IMPORT + f"assert ({OURS}) == (fa4_ext.default_handle is not None) == {registers}",
    "-W", "always",
               FA4_EXT_AUTOREGISTER=value)  # fmt: skip
    assert ours.stderr == bare.stderr


def test_a_setting_that_is_not_allowed_warns_and_registers():
    result = run(
        IMPORT + f"assert {OURS} and fa4_ext.default_handle.active", FA4_EXT_AUTOREGISTER="maybe"
    )
    assert (
        "<string>:2: RuntimeWarning: FA4_EXT_AUTOREGISTER must be one of 0, false, no, off"
        in result.stderr
    ), result.stderr
    assert "is 'maybe'" in result.stderr


def test_a_setting_whose_warning_is_an_error_fails_the_import_and_registers_nothing():
    code = f"""
        import sys, torch, warnings
        warnings.simplefilter("error")
        for _ in range(2):
            try:
                import fa4_ext
            except RuntimeWarning as warning:
                assert "FA4_EXT_AUTOREGISTER" in str(warning) and not {OURS}
            else:
                raise AssertionError
        warnings.simplefilter("ignore")
        import fa4_ext
        assert {OURS} and fa4_ext.default_handle.active
    """
    run(code, FA4_EXT_AUTOREGISTER="maybe")


def test_import_twice_and_reload_register_once():
    run(
        IMPORT
        + f"""
import importlib
import fa4_ext
importlib.reload(fa4_ext)
fa4_ext.default_handle.remove()
assert not {OURS}
"""
    )


def test_import_initialises_no_cuda():
    run(IMPORT + "assert not torch.cuda.is_initialized()")


def test_import_brings_in_no_compiler():
    run(
        IMPORT
        + "import sys\nassert not {'flash_attn', 'cutlass', 'quack', 'tvm_ffi', 'triton.compiler'} "
        "& set(sys.modules)"
    )


def test_override_warning_reaches_neither_stderr_nor_the_filters():
    bare = run(PYTHON_OVERRIDE, "-W", "always")
    ours = run(PYTHON_OVERRIDE + "import fa4_ext", "-W", "always")
    assert ours.stderr == bare.stderr


def test_override_warning_stays_away_with_warn_always_and_warnings_as_errors():
    run(
        PYTHON_OVERRIDE
        + """
import warnings
torch.set_warn_always(True)
# register()'s own, of a torch for CUDA without a driver, is a RuntimeWarning.
warnings.simplefilter("error", UserWarning)
import fa4_ext
fa4_ext.register().remove()
"""
    )


def test_other_warnings_still_reach_the_user_and_the_filters_are_as_before():
    run(
        """
        import warnings, torch
        # Or the dispatcher says it once a process, which the import may have used up.
        torch.set_warn_always(True)
        before = list(warnings.filters)
        import fa4_ext
        assert warnings.filters == before
        library = torch.library.Library("aten", "IMPL")
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            library.impl("_flash_attention_forward", lambda *args, **kwargs: None, "CUDA")
        said = [str(warning.message) for warning in caught]
        assert any("Overriding a previously registered kernel" in text for text in said)
        """
    )


def test_import_works_below_a_default_device_and_a_fake_tensor_mode():
    run(
        f"""
        import torch
        from torch._subclasses.fake_tensor import FakeTensorMode
        torch.set_default_device("meta")
        with FakeTensorMode():
            import fa4_ext
        assert {OURS}
        """
    )


def test_forked_child_registers_and_removes_without_touching_its_parent():
    run(
        IMPORT
        + f"""
import os
child = os.fork()
if child == 0:
    fa4_ext.default_handle.remove()
    gone = not {OURS}
    with fa4_ext.register():
        back = {OURS}
    os._exit(0 if gone and back else 1)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
assert {OURS}
"""
    )


def test_import_in_a_forked_child():
    run(
        f"""
        import os, torch
        child = os.fork()
        if child == 0:
            import fa4_ext
            os._exit(0 if {OURS} else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        """
    )


def test_process_ends_quietly_with_live_handles():
    result = run(IMPORT + "handles = [fa4_ext.register() for _ in range(3)]", "-W", "ignore")
    assert result.stdout == result.stderr == ""


def test_missing_library_says_how_to_build_it(tmp_path):
    import shutil
    from pathlib import Path

    import fa4_ext

    shutil.copytree(
        Path(fa4_ext.__file__).parent,
        tmp_path / "fa4_ext",
        ignore=shutil.ignore_patterns("*.so", "__pycache__"),
    )
    result = python("-c", f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import fa4_ext")
    assert result.returncode == 1
    assert "ImportError: fa4_ext's native library is missing" in result.stderr
    assert "`make build` builds it" in result.stderr
