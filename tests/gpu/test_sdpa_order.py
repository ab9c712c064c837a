"""Flash before cuDNN in plain F.scaled_dot_product_attention, in processes of their own: torch
chooses the order once a process."""

from __future__ import annotations

import json

import pytest
from fresh_process import run_script

REPORT = """
import json, torch, torch.nn.functional as F
q = torch.randn(1, 4, 512, 128, dtype=torch.bfloat16, device="cuda")
def choice():
    return torch._fused_sdp_choice(q, q, q)
def order():
    return torch._C._get_sdp_priority_order()
"""


def process(code: str, **environment: str) -> dict:
    return json.loads(run_script(code, **environment).splitlines()[-1])


def stock() -> dict:
    return process(
        REPORT + "first = choice(); print(json.dumps({'choice': first, 'order': order()}))"
    )


def test_the_very_first_call_of_a_process_takes_flash_and_remove_brings_torchs_order_back():
    seen = process(
        "import fa4_ext\n"
        + REPORT
        + "first = choice(); during = order(); again = choice(); fa4_ext.default_handle.remove()\n"
        "print(json.dumps({'first': first, 'during': during, 'again': again, 'after': order(), "
        "'last': choice()}))",
        FA4_EXT_AUTOREGISTER="1",
    )
    expected = stock()
    assert seen["first"] == seen["again"] == 1
    assert seen["during"] == [1] + [backend for backend in expected["order"] if backend != 1]
    assert (seen["after"], seen["last"]) == (expected["order"], expected["choice"])


def test_registering_after_torch_has_chosen_takes_flash():
    seen = process(
        REPORT + "before = choice(); stock_order = order()\nimport fa4_ext\n"
        "with fa4_ext.register(): during = choice()\n"
        "print(json.dumps({'during': during, 'before': before, 'after': choice(), 'restored': "
        "order() == stock_order}))",
        FA4_EXT_AUTOREGISTER="0",
    )
    assert seen["during"] == 1 and seen["before"] == seen["after"] and seen["restored"]


def test_registering_with_cuda_up_and_nothing_chosen_takes_flash():
    seen = process(
        "import torch; torch.cuda.init(); import fa4_ext; fa4_ext.register()\n"
        + REPORT
        + "print(json.dumps({'choice': choice()}))"
    )
    assert seen["choice"] == 1


def test_first_contact_with_cuda_under_a_fake_tensor_mode_takes_flash():
    seen = process(
        "import torch, fa4_ext; fa4_ext.register()\nfrom torch._subclasses.fake_tensor import "
        "FakeTensorMode\n"
        "with FakeTensorMode(): torch.cuda.init()\n"
        + REPORT
        + "print(json.dumps({'choice': choice()}))"
    )
    assert seen["choice"] == 1


@pytest.mark.parametrize("when", ["before the import", "after it"])
@pytest.mark.parametrize(
    "name",
    [
        "torch._C._get_sdp_priority_order",
        "torch._C._set_sdp_priority_order",
        "torch.cuda._lazy_call",
    ],
)
def test_a_torch_without_an_order_to_change_starts_cuda_and_runs_our_kernels(name, when):
    """A torch to come may be such a one. The low-level op does not depend on the order."""
    cut = f"import torch\ndel {name}\n"
    seen = process(
        ("import warnings; warnings.simplefilter('ignore')\n")
        + (cut + "import fa4_ext\n" if when == "before the import" else "import fa4_ext\n" + cut)
        + """
import json
q = torch.randn(2, 512, 4, 128, device="cuda").bfloat16()
with fa4_ext.register(fallback="error", speed_rules=False) as handle:
    rest = (None, None, 512, 512, 0.0, True, False)
    out = torch.ops.aten._flash_attention_forward(q, q, q, *rest)[0]
*x, out = (t.float().transpose(1, 2) for t in (q, q, q, out))
exact = torch.nn.functional.scaled_dot_product_attention(*x, is_causal=True)
error = (exact - out).abs().max().item()
print(json.dumps({"error": error, "prefer": handle.prefer}))
""",
        FA4_EXT_AUTOREGISTER="1",
    )
    assert seen["error"] < 0.05 and not seen["prefer"], seen


def test_sdpa_kernel_still_decides():
    seen = process(
        "import fa4_ext; fa4_ext.register()\nfrom torch.nn.attention import SDPBackend, "
        "sdpa_kernel\n"
        + REPORT
        + "with sdpa_kernel(SDPBackend.MATH): math = choice()\nprint(json.dumps({'math': math, "
        "'choice': choice()}))"
    )
    assert seen == {"math": 0, "choice": 1}


def test_importing_and_starting_cuda_make_no_context_and_no_output():
    code = (
        "import json, torch\n{}\nassert not torch.cuda.is_initialized()\ntorch.cuda.init()\n"
        "print(json.dumps({{'context': torch._C._cuda_hasPrimaryContext(0), 'allocated': "
        "torch.cuda.memory_reserved()}}))"
    )
    assert process(code.format("import fa4_ext; fa4_ext.register()")) == process(code.format(""))
