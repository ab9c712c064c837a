"""Language models of transformers, with random weights and few layers."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from functools import partial

import torch
from torch import nn

from benchmarks.clients.workload import Place, Results, Step, Workload, loss

LORA_RANK = 16


def config_of(kind: str, place: Place, **changes):
    """Returns a configuration with the shape of a layer of a model of 7 to 9 billion parameters."""
    import transformers

    fields = {
        "vocab_size": place.size(32_000, 64),
        "hidden_size": place.size(4096, 64),
        "intermediate_size": place.size(14_336, 96),
        "num_hidden_layers": place.size(4, 2),
        "num_attention_heads": place.size(32, 4),
        "num_key_value_heads": place.size(8, 2),
        "head_dim": place.size(128, 16),
        "max_position_embeddings": 131_072,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": None,
    }
    return getattr(transformers, kind)(**fields | changes)


def built(config, implementation: str, place: Place, *, head: bool = False) -> nn.Module:
    import transformers

    kind = transformers.AutoModelForCausalLM if head else transformers.AutoModel
    torch.manual_seed(0)
    with torch.device(place.device):
        model = kind.from_config(config, attn_implementation=implementation)
    return place.values(model)


def tokens(place: Place, batch: int, rows: int, vocabulary: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    drawn = torch.randint(2, vocabulary, (batch, rows), generator=generator)
    return drawn.to(place.device)


def lengths_of(batch: int, rows: int) -> torch.Tensor:
    """Returns lengths between a third of the rows and all of them; the first sequence is full."""
    generator = torch.Generator().manual_seed(2)
    lengths = torch.randint(rows // 3, rows + 1, (batch,), generator=generator)
    lengths[0] = rows
    return lengths


def padding(place: Place, batch: int, rows: int, side: str) -> torch.Tensor:
    """Returns a padding mask [batch, rows], 1 for tokens."""
    place_of_row = torch.arange(rows)
    position = place_of_row if side == "right" else rows - 1 - place_of_row
    return (position[None] < lengths_of(batch, rows)[:, None]).long().to(place.device)


def positions_of_packed(place: Place, rows: int) -> torch.Tensor:
    """Returns position_ids [1, rows] of sequences that lie one behind another."""
    lengths, left = [], rows
    generator = torch.Generator().manual_seed(3)
    while left:
        drawn = int(torch.randint(rows // 16, rows // 4, (1,), generator=generator))
        lengths.append(min(left, max(drawn, 1)))
        left -= lengths[-1]
    return torch.cat([torch.arange(length) for length in lengths])[None].to(place.device)


def gradients(model: nn.Module) -> Results:
    """Returns the gradients of the first layer's weights that have one, by name."""
    found = [(name, one.grad) for name, one in model.named_parameters() if one.grad is not None]
    wanted = [(name, grad) for name, grad in found if grad.dim() == 2 and "embed" not in name]
    return dict(wanted[:3])


def training(
    model: nn.Module, inputs: dict, valid: torch.Tensor | None, *, autocast: torch.dtype | None
) -> Step:
    """Returns a step of training without the optimizer. Rows of padding count for nothing."""

    def step() -> Results:
        model.zero_grad(set_to_none=True)
        device = next(iter(inputs.values())).device.type
        context = torch.autocast(device, autocast) if autocast else contextlib.nullcontext()
        with context:
            hidden = model(**inputs, use_cache=False).last_hidden_state
        hidden = hidden if valid is None else hidden[valid]
        loss(hidden).backward()
        return {"hidden": hidden.detach()} | gradients(model)

    return step


class LowRank(nn.Module):
    """A linear layer that is frozen, and a product of two small ones that is trained."""

    def __init__(self, layer: nn.Linear, place: Place):
        super().__init__()
        self.layer = layer.requires_grad_(False)
        out, width = layer.weight.shape
        self.down = nn.Parameter(place.normal(LORA_RANK, width, seed=4) / 64)
        self.up = nn.Parameter(place.normal(out, LORA_RANK, seed=5) / 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x) + x @ self.down.t() @ self.up.t()


def with_lora(model: nn.Module, place: Place) -> None:
    model.requires_grad_(False)
    for module in list(model.modules()):
        for name in ("q_proj", "v_proj"):
            if isinstance(layer := getattr(module, name, None), nn.Linear):
                setattr(module, name, LowRank(layer, place))
    model.enable_input_require_grads()


def train(
    implementation: str,
    place: Place,
    *,
    kind: str = "LlamaConfig",
    batch: int = 1,
    rows: int = 8192,
    padded: str | None = None,
    packed: bool = False,
    autocast: bool = False,
    prepare: Callable[[nn.Module, Place], object] = lambda model, place: None,
    **changes,
) -> Step:
    """Makes a step of training a decoder. `prepare` changes the model before."""
    rows = place.size(rows, 48)
    config = config_of(kind, place, **changes)
    weights = Place(place.device, torch.float32, place.tiny) if autocast else place
    model = built(config, implementation, weights)
    prepare(model, weights)
    inputs = {"input_ids": tokens(place, batch, rows, config.vocab_size)}
    valid = None
    if padded:
        inputs["attention_mask"] = padding(place, batch, rows, padded)
        valid = inputs["attention_mask"].bool()
    if packed:
        inputs["position_ids"] = positions_of_packed(place, rows)
    return training(model, inputs, valid, autocast=place.dtype if autocast else None)


def checkpointed(model: nn.Module, place: Place) -> None:
    model.train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


def compiled(model: nn.Module, place: Place) -> None:
    model.compile()


def prefill(implementation: str, place: Place, *, kind: str, batch: int, rows: int, **changes):
    """Makes a forward over a prompt, without gradients."""
    config = config_of(kind, place, **changes)
    model = built(config, implementation, place).eval()
    inputs = tokens(place, batch, place.size(rows, 48), config.vocab_size)

    @torch.no_grad()
    def step() -> Results:
        return {"hidden": model(input_ids=inputs, use_cache=False).last_hidden_state}

    return step


def generate(implementation: str, place: Place, *, cache: str, padded: bool) -> Step:
    """Makes the generation of some tokens. What is compared is the first one's logits: later ones
    depend on choices between tokens that are nearly as likely."""
    config = config_of("LlamaConfig", place)
    model = built(config, implementation, place, head=True).eval()
    batch, rows = 4, place.size(2048, 24)
    inputs = {"input_ids": tokens(place, batch, rows, config.vocab_size)}
    if padded:
        inputs["attention_mask"] = padding(place, batch, rows, "left")
    count = place.size(32, 3)

    @torch.no_grad()
    def step() -> Results:
        done = model.generate(
            **inputs, max_new_tokens=count, min_new_tokens=count, do_sample=False,
            cache_implementation=cache, output_logits=True, return_dict_in_generate=True,
            disable_compile=True,
        )  # fmt: skip
        return {"logits": done.logits[0]}

    return step


def speculate(implementation: str, place: Place) -> Step:
    """Makes the check of drafted tokens on a cache, which is cut back after it."""
    import transformers

    config = config_of("LlamaConfig", place)
    model = built(config, implementation, place).eval()
    rows, drafted = place.size(8192, 24), 5
    inputs = tokens(place, 4, rows + drafted, config.vocab_size)
    cache = transformers.DynamicCache()
    with torch.no_grad():
        model(input_ids=inputs[:, :rows], past_key_values=cache, use_cache=True)

    @torch.no_grad()
    def step() -> Results:
        checked = model(input_ids=inputs[:, rows:], past_key_values=cache, use_cache=True)
        cache.crop(-drafted)
        return {"hidden": checked.last_hidden_state}

    return step


def _window(full: int) -> Callable[[str, Place], Step]:
    def make(implementation: str, place: Place) -> Step:
        return train(
            implementation, place, kind="MistralConfig", sliding_window=place.size(full, 12)
        )

    return make


def _gemma(implementation: str, place: Place) -> Step:
    return train(
        implementation, place, kind="Gemma3TextConfig", num_hidden_layers=place.size(6, 6),
        hidden_size=place.size(2560, 64), intermediate_size=place.size(10_240, 96),
        num_attention_heads=place.size(8, 4), num_key_value_heads=place.size(4, 2),
        head_dim=place.size(256, 16), sliding_window=place.size(1024, 12),
    )  # fmt: skip


def _gpt_oss(implementation: str, place: Place) -> Step:
    return prefill(
        implementation, place, kind="GptOssConfig", batch=1, rows=4096,
        hidden_size=place.size(2880, 64), intermediate_size=place.size(2880, 32),
        num_attention_heads=place.size(64, 4), num_key_value_heads=place.size(8, 2),
        head_dim=place.size(64, 16), num_local_experts=place.size(32, 4), num_experts_per_tok=4,
        sliding_window=place.size(128, 12),
    )  # fmt: skip


WORKLOADS = (
    Workload("llama 8k", train),
    Workload("llama 4 x 2k", partial(train, batch=4, rows=2048)),
    Workload("llama, padded right", partial(train, batch=4, rows=2048, padded="right")),
    Workload("llama, packed", partial(train, packed=True)),
    Workload("llama, autocast", partial(train, batch=4, rows=2048, autocast=True)),
    Workload("llama, checkpointed", partial(train, prepare=checkpointed)),
    Workload("llama, LoRA", partial(train, prepare=with_lora)),
    Workload("llama, compiled", partial(train, prepare=compiled), compiled=True),
    Workload("mistral, window 1k", _window(1024)),
    Workload("gemma 3, windows", _gemma),
    Workload("gpt-oss prefill", _gpt_oss, ("eager", "fa4_ext"), eager=True),
    Workload("generate", partial(generate, cache="dynamic", padded=False)),
    Workload("generate, padded left", partial(generate, cache="dynamic", padded=True)),
    Workload("generate, static cache", partial(generate, cache="static", padded=False)),
    Workload("speculative decode", speculate),
)
