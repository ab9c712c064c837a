"""Cases of test_hub.py, each for a process of its own: python hub_cases.py CASE [ARGUMENTS].

`kernels` is Hugging Face's package here: the checkout, whose folder of that name would hide it, is
not on the path.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path

import torch

REPO = "someone/flash-attn"


def load():
    """Returns the package, as LOCAL_KERNELS says where it is, and an absent network."""
    import kernels

    return kernels.get_kernel(REPO, version=1)


def compute(*packages):
    """Registers the math for the packages' ops, and returns its module."""
    import math_ops

    for name in {package.__name__ for package in packages}:
        math_ops.register(name)
    return math_ops


def qkv() -> list[torch.Tensor]:
    torch.manual_seed(0)
    shapes = (2, 5, 4, 16), (2, 7, 2, 16), (2, 7, 2, 16)
    return [torch.randn(shape, requires_grad=True) for shape in shapes]


def has_a_variant_for_cuda_13(out: str) -> None:
    from kernels.resolver import resolve_local_kernel

    for version, expected in (("13.0", True), ("13.4", True), ("12.8", False), ("14.0", False)):
        torch.version.cuda = version
        try:
            found = bool(resolve_local_kernel(Path(out), backend=None))
        except FileNotFoundError:
            found = False
        assert found == expected, (version, found)


def dispatcher() -> dict[str, str]:
    names = torch._C._dispatch_get_all_op_names()
    return {name: torch._C._dispatch_dump(name) for name in names}


def changes_its_own_ops_alone() -> None:
    # They define ops of their own when they are first imported.
    for name in "kernels", "torch._dynamo":
        importlib.import_module(name)
    before = dispatcher()
    package = load()
    after = dispatcher()
    changed = [name for name in before if before[name] != after[name]]
    assert not changed, changed
    own = {"attention", "attention_backward", "attention_with_sink", "explain"}
    new = after.keys() - before.keys()
    assert new == {f"{package.__name__}::{name}" for name in own}, new
    assert "fa4_ext" not in sys.modules


def module_of_another_name(folder: str):
    """Returns the package as older versions of `kernels` load it, which name the module after its
    path."""
    spec = importlib.util.spec_from_file_location("package_7", Path(folder, "__init__.py"))
    assert spec and spec.loader
    sys.modules["package_7"] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.flash_attn_func.__module__ == "package_7._functions"
    return module


def lives_beside_others(copy: str, other: str) -> None:
    """`copy` is the package in another folder, `other` one of another build."""
    package = load()
    import fa4_ext.flash_attn
    import kernels

    copied, other_build = (kernels.get_local_kernel(Path(folder)) for folder in (copy, other))
    assert load() is package and copied is not package
    assert copied.__name__ == package.__name__ != other_build.__name__, other_build.__name__
    math_ops = compute(package, other_build)
    q, k, v = qkv()
    right = fa4_ext.flash_attn.flash_attn_func(q, k, v, causal=True)
    for one in package, copied, other_build, module_of_another_name(copy):
        assert one.flash_attn_func(q, k, v, causal=True).equal(right), one
    assert len(math_ops.calls) == 5, math_ops.calls
    override = "registered at fa4_ext:"
    assert override in torch._C._dispatch_dump("aten::_flash_attention_forward")
    fa4_ext.default_handle.remove()
    assert override not in torch._C._dispatch_dump("aten::_flash_attention_forward")


def finds_its_namespace_taken(namespace: str) -> None:
    taken = torch.library.Library(namespace, "DEF")
    try:
        load()
    except RuntimeError as error:
        print(error)
    assert taken


def dense(functions) -> list:
    inputs = q, k, v, sink = *qkv(), torch.linspace(-1, 1, 4, requires_grad=True)
    out = functions.flash_attn_func(q, k, v, causal=True, learnable_sink=sink)
    return [out, *torch.autograd.grad(out.sum(), inputs)]


def packed(functions) -> list:
    q, k, v = (tensor[0, :5] for tensor in qkv())
    starts = torch.tensor([0, 2, 5], dtype=torch.int32)
    return [functions.flash_attn_varlen_func(q, k, v, starts, starts, 3, 3)]


def cached(functions) -> list:
    q, k, v = (tensor.detach() for tensor in qkv())
    new = k[:, :1].clone(), v[:, :1].clone()
    options = {"cache_seqlens": torch.tensor([3, 6]), "causal": True}
    return [functions.flash_attn_with_kvcache(q[:, :1], k, v, *new, **options), k, v]


def compiled(functions) -> list:
    call = torch.compile(functions.flash_attn_func, fullgraph=True, backend="aot_eager")
    return [call(*qkv(), window_size=(2, 0))]


def computes_what_fa4_ext_computes() -> None:
    import fa4_ext.flash_attn

    package = load()
    math_ops = compute(package)
    for case in dense, packed, cached, compiled:
        for ours, right in zip(case(package), case(fa4_ext.flash_attn), strict=True):
            assert ours.isfinite().all() and ours.equal(right), (case, (ours - right).abs().max())
    counts = [math_ops.calls.count(op) for op in ("attention", "attention_backward")]
    assert counts == [8, 2], counts


def let_transformers_take_this_version_of_kernels() -> None:
    """transformers 5.24 asks for `kernels` 0.18.2, which PyPI did not have."""
    from transformers.utils import import_utils

    import_utils.is_kernels_available = lambda *_, **__: True


def check_that_transformers_finds_its_arguments() -> None:
    """transformers passes what inspect.signature shows, and leaves out the rest without a word."""
    from transformers.modeling_flash_attention_utils import lazy_import_flash_attention

    (*functions, _, _), readers = lazy_import_flash_attention(REPO)
    assert all(functions), functions
    common = {"softcap", "softmax_scale", "window_size", "learnable_sink", "block_table"}
    varlen = {"dropout_p", "deterministic", "max_seqlen_q", "max_seqlen_k"}
    for reader, wanted in zip(readers, (varlen, {"cache_seqlens"}), strict=True):
        found = {name for name, there in reader.keywords["supports_mapping"].items() if there}
        assert common | wanted <= found, (common | wanted) - found


def llama(implementation: str):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=99, max_position_embeddings=64,
    )  # fmt: skip
    return LlamaForCausalLM._from_config(config, attn_implementation=implementation)


def batches() -> dict[str, dict]:
    ids = torch.randint(0, 99, (2, 12))
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    positions = torch.cat([torch.arange(5), torch.arange(7)])[None]
    return {
        "plain": {"input_ids": ids},
        "padded": {"input_ids": ids, "attention_mask": mask},
        "packed": {"input_ids": ids[:1], "position_ids": positions},
    }


def runs_a_llama_as_sdpa_does() -> None:
    let_transformers_take_this_version_of_kernels()
    check_that_transformers_finds_its_arguments()
    math_ops = compute(load())
    models, inputs = (llama(REPO), llama("sdpa")), batches()
    for name, batch in inputs.items():
        math_ops.calls.clear()
        ours, right = (model(**batch, use_cache=False).logits for model in models)
        rows = batch.get("attention_mask", torch.ones(ours.shape[:2])).bool()
        error = (ours - right)[rows].abs().max().item()
        assert error < 1e-5, (name, error)
        assert math_ops.calls == ["attention"] * 2, (name, math_ops.calls)
        for model, logits in zip(models, (ours, right), strict=True):
            model.zero_grad()
            logits[rows].square().mean().backward()
        for (weight, one), other in zip(
            models[0].named_parameters(), models[1].parameters(), strict=True
        ):
            error = (one.grad - other.grad).abs().max().item()
            assert error < 1e-5, (name, weight, error)
    options = {"max_new_tokens": 4, "do_sample": False}
    ours, right = (model.generate(**inputs["padded"], **options).tolist() for model in models)
    assert ours == right, (ours, right)


if __name__ == "__main__":
    globals()[sys.argv[1]](*sys.argv[2:])
