"""A fixed list of 200 calls of PyTorch's flash attention ops, as models that people run make them.

README says how many of them our kernels run. The list is of what people run, not of what we cover:
a call is removed only when nobody runs it any more.

The mix: Llama 36, Qwen 30, Gemma 24, Diffusion 22, Mistral 18, BERT 16, ViT 16, GPT-OSS 14,
DeepSeek 12, Whisper 12. By use: training forward 54, training backward 54, inference 62 (a prompt
or a chunk, an encoder, a denoising step), decode 30.

Heads, head dims and windows are those of the models' published configurations, which `source`
names; lengths stay within what the model takes, batches and lengths are usual ones for one GPU.
`ranks` is tensor parallelism: a GPU holds that part of the heads. Packed calls (varlen) have their
sequences back to back; windows are mostly packed, because torch.nn.attention.varlen takes a window
and F.scaled_dot_product_attention does not.

Not here, because these ops never see it: attention with a mask tensor, with softcap (Gemma 2), with
head dims above 256 (DeepSeek's decoding with absorbed weights), in fp32. GPT-OSS is here without
its sinks, which are applied to the output afterwards, with the logsumexp. DeepSeek's head dims of
192 and 128 are here, although F.scaled_dot_product_attention itself gives flash attention equal
ones only.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

PAGE_SIZE = 256  # keys; PyTorch's own kernel takes only multiples of it
TRAINING = ("training forward", "training backward")
INFERENCE = ("inference",)
DECODE = ("decode",)


@dataclass(frozen=True)
class Model:
    family: str
    name: str
    heads: int
    heads_kv: int
    head_dim: int
    source: str
    head_dim_v: int = 0  # 0: head_dim
    causal: bool = False
    # Layers with a window have these bounds, left and right.
    window: tuple[int, int] = (-1, -1)


def _litgpt(
    family: str, name: str, heads: int, heads_kv: int, head_dim: int, window: int = 0
) -> Model:
    """Describes a language model whose window of n tokens includes the query's own."""
    source = (
        "Lightning-AI/litgpt litgpt/config.py: n_head, n_query_groups, head_size, "
        "sliding_window_size"
    )
    return Model(
        family,
        name,
        heads,
        heads_kv,
        head_dim,
        source,
        causal=True,
        window=(window - 1, 0) if window else (-1, -1),
    )


def _timm(name: str, heads: int, head_dim: int) -> Model:
    source = (
        "huggingface/pytorch-image-models timm/models/vision_transformer.py: num_heads, embed_dim "
        "/ num_heads"
    )
    return Model("ViT", name, heads, heads, head_dim, source)


def _diffusers(name: str, heads: int, head_dim: int, file: str) -> Model:
    return Model(
        "Diffusion",
        name,
        heads,
        heads,
        head_dim,
        f"huggingface/diffusers: num_attention_heads, attention_head_dim of {file}",
    )


def _transformers(
    family: str,
    name: str,
    heads: int,
    heads_kv: int,
    head_dim: int,
    folder: str,
    fields: str,
    **rest,
) -> Model:
    source = f"huggingface/transformers models/{folder}/configuration_{folder}.py: {fields}"
    return Model(family, name, heads, heads_kv, head_dim, source, **rest)


_BERT = "num_attention_heads, hidden_size / num_attention_heads, max_position_embeddings 512"
_MODERNBERT = "num_attention_heads, hidden_size / num_attention_heads, local_attention 128"
_GPT_OSS = dict(
    folder="gpt_oss",
    fields="num_attention_heads, num_key_value_heads, head_dim, sliding_window 128",
    causal=True,
    window=(127, 0),
)
_DEEPSEEK = dict(
    folder="deepseek_v3",
    fields="num_attention_heads, qk_nope_head_dim + qk_rope_head_dim, v_head_dim",
    causal=True,
    head_dim_v=128,
)
_WHISPER = (
    "k2-fsa/sherpa-onnx scripts/whisper/model-info.md: n_audio_head, n_audio_state / n_audio_head, "
    "n_audio_ctx, n_text_ctx"
)
_UNET = (
    "src/diffusers/models/unets/unet_2d_condition.py, whose attention_head_dim is the number of "
    "heads, with block_out_channels"
)
_SDXL = (
    "stabilityai/stable-diffusion-xl-base-1.0 unet/config.json: attention_head_dim 5, 10, 20, "
    "block_out_channels 320, 640, 1280"
)
_TRANSFORMERS = "src/diffusers/models/transformers/"

MODELS = {
    model.name: model
    for model in (
        _litgpt("Llama", "Llama-2-7b", 32, 32, 128),
        _litgpt("Llama", "Llama-2-13b", 40, 40, 128),
        _litgpt("Llama", "Llama-2-70b", 64, 8, 128),
        _litgpt("Llama", "Llama-3-8B", 32, 8, 128),
        _litgpt("Llama", "Llama-3.1-8B", 32, 8, 128),
        _litgpt("Llama", "Llama-3.1-70B", 64, 8, 128),
        _litgpt("Llama", "Llama-3.1-405B", 128, 8, 128),
        _litgpt("Llama", "Llama-3.2-1B", 32, 8, 64),
        _litgpt("Llama", "Llama-3.2-3B", 24, 8, 128),
        _litgpt("Qwen", "Qwen2.5-0.5B", 14, 2, 64),
        _litgpt("Qwen", "Qwen2.5-1.5B", 12, 2, 128),
        _litgpt("Qwen", "Qwen2.5-7B", 28, 4, 128),
        _litgpt("Qwen", "Qwen2.5-32B", 40, 8, 128),
        _litgpt("Qwen", "Qwen2.5-72B", 64, 8, 128),
        _litgpt("Qwen", "Qwen3-0.6B", 16, 8, 128),
        _litgpt("Qwen", "Qwen3-8B", 32, 8, 128),
        _litgpt("Qwen", "Qwen3-30B-A3B", 32, 4, 128),
        _litgpt("Qwen", "Qwen3-235B-A22B", 64, 4, 128),
        _litgpt("Gemma", "Gemma-2b", 8, 1, 256),
        _litgpt("Gemma", "Gemma-7b", 16, 16, 256),
        _litgpt("Gemma", "Gemma-3-1b", 4, 1, 256, window=512),
        _litgpt("Gemma", "Gemma-3-4b", 8, 4, 256, window=1024),
        _litgpt("Gemma", "Gemma-3-12b", 16, 8, 256, window=1024),
        _litgpt("Gemma", "Gemma-3-27b", 32, 16, 128, window=1024),
        _litgpt("Mistral", "Mistral-7B-v0.1", 32, 8, 128, window=4096),
        _litgpt("Mistral", "Mixtral-8x7B", 32, 8, 128),
        _litgpt("Mistral", "Mixtral-8x22B", 48, 8, 128),
        _litgpt("Mistral", "Mistral-Large-2407", 96, 8, 128),
        Model(
            "Mistral", "Mistral-Nemo-2407", 32, 8, 128, causal=True,
            source="kevinstephano/thunder_model_blocks mistral_config.py: num_attention_heads, "
                "num_key_value_heads, head_dim",
        ),
        replace(
            _transformers("DeepSeek", "DeepSeek-V2-Lite", 16, 16, 192, **_DEEPSEEK),
            source="deepseek-ai/DeepSeek-V3 inference/configs/config_16B.json: n_heads, "
                "qk_nope_head_dim + qk_rope_head_dim",
        ),
        _transformers("DeepSeek", "DeepSeek-V3", 128, 128, 192, **_DEEPSEEK),
        _transformers("GPT-OSS", "gpt-oss-20b", 64, 8, 64, **_GPT_OSS),
        _transformers("GPT-OSS", "gpt-oss-120b", 64, 8, 64, **_GPT_OSS),
        _transformers("BERT", "bert-base", 12, 12, 64, "bert", _BERT),
        Model("BERT", "bert-large", 16, 16, 64, "google-research/bert README.md: 24-layer, "
            "1024-hidden, 16-heads"),
        _transformers("BERT", "ModernBERT-base", 12, 12, 64, "modernbert", _MODERNBERT,
            window=(64, 64)),
        _timm("ViT-B/16", 12, 64),
        _timm("ViT-L/16", 16, 64),
        _timm("ViT-L/14 CLIP", 16, 64),
        _timm("ViT-H/14", 16, 80),
        _timm("SigLIP so400m/14", 16, 72),
        _timm("DINOv2 ViT-L/14", 16, 64),
        _timm("DINOv2 ViT-g/14", 24, 64),
        _transformers("ViT", "Qwen2.5-VL vision", 16, 16, 80, "qwen2_5_vl", "num_heads, "
            "window_size 112; 1280 wide"),
        Model("Whisper", "Whisper large-v3", 20, 20, 64, _WHISPER),
        Model("Whisper", "Whisper small", 12, 12, 64, _WHISPER),
        _diffusers("Stable Diffusion 1.5, level 1", 8, 40, _UNET),
        _diffusers("Stable Diffusion 1.5, level 2", 8, 80, _UNET),
        _diffusers("Stable Diffusion 1.5, level 3", 8, 160, _UNET),
        Model("Diffusion", "SDXL, level 2", 10, 10, 64, _SDXL),
        Model("Diffusion", "SDXL, level 3", 20, 20, 64, _SDXL),
        _diffusers("Stable Diffusion 3 medium", 24, 64, "scripts/convert_sd3_to_diffusers.py, as "
            "many heads as its 24 layers"),
        _diffusers("FLUX.1", 24, 128, f"{_TRANSFORMERS}transformer_flux.py"),
        _diffusers("DiT-XL/2", 16, 72, f"{_TRANSFORMERS}dit_transformer_2d.py"),
        _diffusers("CogVideoX-2B", 30, 64, f"{_TRANSFORMERS}cogvideox_transformer_3d.py"),
        _diffusers("Wan2.1-14B", 40, 128, f"{_TRANSFORMERS}transformer_wan.py"),
    )
}  # fmt: skip


@dataclass(frozen=True)
class Call:
    model: Model
    use: str
    layout: str
    batch: int
    seqlen_q: int  # packed: of the longest sequence
    seqlen_k: int
    total_q: int
    total_k: int
    heads: int
    heads_kv: int
    causal: bool
    window: tuple[int, int]
    dtype: str
    deterministic: bool
    dropout_p: float
    paged: bool

    @property
    def name(self) -> str:
        heads = f"H{self.heads}" + (f"/{self.heads_kv}" if self.heads != self.heads_kv else "")
        head_dim, head_dim_v = self.model.head_dim, self.model.head_dim_v
        parts = [
            f"B{self.batch} {heads} D{head_dim}" + (f"/{head_dim_v}" if head_dim_v else ""),
            self._lengths(),
        ]
        parts += ["causal"] if self.causal and self.window == (-1, -1) else []
        parts += ["window {} {}".format(*self.window)] if self.window != (-1, -1) else []
        parts += ["deterministic"] if self.deterministic else []
        parts += [f"dropout {self.dropout_p}"] if self.dropout_p else []
        parts += ["paged"] if self.paged else []
        return f"{self.model.name}, {self.use}: {', '.join([*parts, self.dtype])}"

    def _lengths(self) -> str:
        if self.layout == "dense":
            return f"S{self.seqlen_q}" + (
                f"/{self.seqlen_k}" if self.seqlen_q != self.seqlen_k else ""
            )
        total = f"{self.total_q}" + (f"/{self.total_k}" if self.total_q != self.total_k else "")
        longest = f"{self.seqlen_q}" + (
            f"/{self.seqlen_k}" if self.seqlen_q != self.seqlen_k else ""
        )
        return f"packed {total}, longest {longest}"

    def problem(self, capability: int) -> dict:
        """Returns the dict that scripts.core_problem.core_problem takes. Dropout is not part of
        it."""
        return {
            "op": "backward" if self.use == "training backward" else "forward",
            "capability": capability,
            "num_heads": self.heads,
            "num_heads_kv": self.heads_kv,
            "head_dim": self.model.head_dim,
            "head_dim_v": self.model.head_dim_v or self.model.head_dim,
            "is_causal": self.causal,
            "window_size_left": self.window[0],
            "window_size_right": self.window[1],
            "page_size": PAGE_SIZE if self.paged else 0,
        } | {
            field: getattr(self, field)
            for field in (
                "layout",
                "dtype",
                "batch",
                "seqlen_q",
                "seqlen_k",
                "total_q",
                "total_k",
                "deterministic",
            )
        }


def _calls(
    model: str,
    uses: tuple[str, ...],
    layout: str,
    *sizes: int,
    windowed: bool = False,
    causal: bool | None = None,
    ranks: int = 1,
    dtype: str = "bf16",
    deterministic: bool = False,
    dropout_p: float = 0.0,
    paged: bool = False,
) -> list[Call]:
    found = MODELS[model]
    if causal is None:
        # One query sees every key.
        causal = found.causal and sizes[1] > 1
    window = found.window if windowed else (-1, -1)
    heads, heads_kv = found.heads // ranks, max(found.heads_kv // ranks, 1)
    rest = (heads, heads_kv, causal, window, dtype, deterministic, dropout_p, paged)
    return [Call(found, use, layout, *sizes, *rest) for use in uses]


def dense(
    model: str, uses: tuple[str, ...], batch: int, seqlen_q: int, seqlen_k: int = 0, **options
) -> list[Call]:
    seqlen_k = seqlen_k or seqlen_q
    return _calls(
        model,
        uses,
        "dense",
        batch,
        seqlen_q,
        seqlen_k,
        batch * seqlen_q,
        batch * seqlen_k,
        **options,
    )


def packed(
    model: str,
    uses: tuple[str, ...],
    batch: int,
    total: int,
    longest: int = 0,
    *,
    total_k: int = 0,
    **options,
) -> list[Call]:
    """Returns packed calls. `longest` is total / batch by default: all sequences have the same
    length. `total_k` is the number of keys, for sequences that have one query each."""
    longest = longest or total // batch
    return _calls(
        model,
        uses,
        "varlen",
        batch,
        1 if total_k else longest,
        longest,
        total,
        total_k or total,
        **options,
    )


CALLS: tuple[Call, ...] = (
    # Llama
    *dense("Llama-2-7b", TRAINING, 4, 4096),
    *dense("Llama-2-7b", INFERENCE, 1, 2048, dtype="fp16"),
    *dense("Llama-2-7b", DECODE, 8, 1, 2048, dtype="fp16"),
    *dense("Llama-2-13b", TRAINING, 2, 4096),
    *dense("Llama-2-70b", TRAINING, 1, 4096, ranks=8),
    *dense("Llama-2-70b", INFERENCE, 4, 1024, ranks=8, dtype="fp16"),
    *dense("Llama-3-8B", TRAINING, 2, 8192),
    *packed("Llama-3-8B", TRAINING, 24, 16384, 4096),  # fine-tuning on documents
    *dense("Llama-3-8B", INFERENCE, 8, 512),
    *dense("Llama-3.1-8B", TRAINING, 1, 32768),
    *dense("Llama-3.1-8B", INFERENCE, 1, 131072),
    *packed("Llama-3.1-8B", INFERENCE, 16, 8192, 2048),
    *dense("Llama-3.1-8B", INFERENCE, 1, 2048, 34816),  # a chunk of a long prompt
    *dense("Llama-3.1-8B", DECODE, 1, 1, 8192),
    *dense("Llama-3.1-8B", DECODE, 32, 1, 4096),
    *packed("Llama-3.1-8B", DECODE, 64, 64, 8192, total_k=131072, paged=True),
    *dense("Llama-3.1-70B", TRAINING, 1, 8192, ranks=8),
    *dense("Llama-3.1-70B", INFERENCE, 1, 16384, ranks=8),
    *dense("Llama-3.1-70B", DECODE, 16, 1, 8192, ranks=8),
    *dense("Llama-3.1-405B", TRAINING, 1, 8192, ranks=8),
    *dense("Llama-3.1-405B", DECODE, 8, 1, 32768, ranks=8),
    *dense("Llama-3.2-1B", TRAINING, 8, 2048),
    *dense("Llama-3.2-1B", INFERENCE, 1, 256),
    *dense("Llama-3.2-1B", DECODE, 1, 1, 1024),
    *dense("Llama-3.2-3B", TRAINING, 4, 4096, deterministic=True),
    *dense("Llama-3.2-3B", DECODE, 4, 8, 4096),  # eight speculated tokens
    # Qwen
    *dense("Qwen2.5-0.5B", TRAINING, 8, 4096),
    *dense("Qwen2.5-0.5B", DECODE, 1, 1, 2048),
    *dense("Qwen2.5-1.5B", TRAINING, 4, 4096),
    *dense("Qwen2.5-1.5B", INFERENCE, 1, 1024),
    *dense("Qwen2.5-7B", TRAINING, 2, 8192),
    *packed("Qwen2.5-7B", TRAINING, 16, 32768, 8192),
    *dense("Qwen2.5-7B", INFERENCE, 1, 32768),
    *packed("Qwen2.5-7B", INFERENCE, 32, 8192, 1024),
    *dense("Qwen2.5-7B", DECODE, 16, 1, 4096),
    *dense("Qwen2.5-32B", TRAINING, 1, 4096, ranks=4),
    *packed("Qwen2.5-32B", DECODE, 32, 32, 8192, total_k=98304, ranks=4, paged=True),
    *dense("Qwen2.5-72B", INFERENCE, 1, 8192, ranks=8),
    *dense("Qwen2.5-72B", DECODE, 64, 1, 2048, ranks=8),
    *dense("Qwen3-0.6B", TRAINING, 16, 2048),
    *dense("Qwen3-8B", TRAINING, 1, 32768),
    *packed("Qwen3-8B", TRAINING, 64, 65536, 4096),  # reinforcement learning on answers
    *dense("Qwen3-8B", INFERENCE, 1, 4096),
    *dense("Qwen3-8B", DECODE, 1, 1, 40960),
    *dense("Qwen3-30B-A3B", TRAINING, 1, 8192),
    *dense("Qwen3-235B-A22B", INFERENCE, 1, 16384, ranks=4),
    *dense("Qwen3-235B-A22B", DECODE, 32, 1, 8192, ranks=4),
    # Gemma
    *dense("Gemma-2b", TRAINING, 4, 2048),
    *dense("Gemma-2b", INFERENCE, 1, 1024),
    *dense("Gemma-2b", DECODE, 1, 1, 2048),
    *dense("Gemma-7b", TRAINING, 2, 4096),
    *dense("Gemma-7b", INFERENCE, 1, 4096),
    *dense("Gemma-7b", DECODE, 4, 1, 2048),
    *dense("Gemma-3-1b", TRAINING, 4, 4096),
    *packed("Gemma-3-1b", TRAINING, 4, 16384, windowed=True),
    *dense("Gemma-3-1b", DECODE, 1, 1, 512),  # a windowed layer keeps 512 keys
    *dense("Gemma-3-4b", TRAINING, 2, 8192),
    *packed("Gemma-3-4b", TRAINING, 2, 16384, windowed=True),
    *dense("Gemma-3-4b", INFERENCE, 1, 32768),
    *packed("Gemma-3-12b", TRAINING, 12, 16384, 4096, windowed=True),
    *dense("Gemma-3-12b", INFERENCE, 1, 8192),
    *dense("Gemma-3-27b", INFERENCE, 1, 65536),
    *packed("Gemma-3-27b", INFERENCE, 4, 32768, windowed=True),
    *dense("Gemma-3-27b", DECODE, 8, 1, 8192),
    # Mistral
    *dense("Mistral-7B-v0.1", TRAINING, 1, 16384, windowed=True),
    *packed("Mistral-7B-v0.1", TRAINING, 2, 16384, windowed=True),
    *packed("Mistral-7B-v0.1", INFERENCE, 1, 32768, windowed=True),
    *dense("Mistral-7B-v0.1", INFERENCE, 1, 2048, windowed=True),  # shorter than the window
    *dense("Mistral-7B-v0.1", DECODE, 4, 1, 4096),  # the cache keeps 4096 keys
    *dense("Mixtral-8x7B", TRAINING, 1, 32768),
    *packed("Mixtral-8x7B", INFERENCE, 8, 16384, 4096),
    *dense("Mixtral-8x7B", DECODE, 16, 1, 8192),
    *dense("Mistral-Nemo-2407", TRAINING, 2, 8192),
    *dense("Mistral-Nemo-2407", INFERENCE, 1, 65536),
    *packed("Mistral-Nemo-2407", DECODE, 16, 16, 16384, total_k=65536, paged=True),
    *dense("Mixtral-8x22B", INFERENCE, 1, 16384, ranks=8),
    *dense("Mistral-Large-2407", INFERENCE, 4, 4096, ranks=8),
    *dense("Mistral-Large-2407", DECODE, 8, 1, 16384, ranks=8),
    # DeepSeek
    *dense("DeepSeek-V2-Lite", TRAINING, 4, 4096),
    *packed("DeepSeek-V2-Lite", TRAINING, 16, 32768, 8192),
    *dense("DeepSeek-V2-Lite", INFERENCE, 1, 8192),
    *dense("DeepSeek-V2-Lite", DECODE, 8, 1, 4096),
    *dense("DeepSeek-V3", TRAINING, 1, 4096),
    *dense("DeepSeek-V3", TRAINING, 1, 4096, ranks=8),
    *packed("DeepSeek-V3", INFERENCE, 8, 16384, 4096),
    *dense("DeepSeek-V3", INFERENCE, 1, 32768, ranks=8),
    # GPT-OSS: every second layer has the window
    *dense("gpt-oss-20b", TRAINING, 2, 4096),
    *packed("gpt-oss-20b", TRAINING, 2, 8192, windowed=True),
    *packed("gpt-oss-20b", TRAINING, 12, 16384, 4096, windowed=True),
    *dense("gpt-oss-20b", INFERENCE, 1, 16384),
    *packed("gpt-oss-20b", INFERENCE, 1, 16384, windowed=True),
    *dense("gpt-oss-20b", DECODE, 1, 1, 8192),
    *dense("gpt-oss-20b", DECODE, 1, 1, 128),
    *packed("gpt-oss-120b", INFERENCE, 16, 16384, 2048),
    *packed("gpt-oss-120b", INFERENCE, 16, 16384, 2048, windowed=True),
    *dense("gpt-oss-120b", DECODE, 32, 1, 16384),
    *packed("gpt-oss-120b", DECODE, 64, 64, 16384, total_k=262144, paged=True),
    # BERT: attention_probs_dropout_prob is 0.1 in training, ModernBERT's is 0
    *dense("bert-base", TRAINING, 32, 512, dropout_p=0.1),
    *packed("bert-base", TRAINING, 32, 8192, 512, dropout_p=0.1),
    *dense("bert-base", INFERENCE, 32, 512, dtype="fp16"),
    *dense("bert-base", INFERENCE, 1, 128),
    *packed("bert-base", INFERENCE, 64, 8192, 512),
    *packed("bert-base", INFERENCE, 32, 12288, 512),
    *dense("bert-large", TRAINING, 16, 512, dropout_p=0.1),
    *packed("bert-large", INFERENCE, 16, 4096, 512, dtype="fp16"),
    *packed("ModernBERT-base", TRAINING, 32, 32768, 8192),
    *packed("ModernBERT-base", TRAINING, 32, 32768, 8192, windowed=True),
    *packed("ModernBERT-base", INFERENCE, 16, 8192, 1024, windowed=True),
    # ViT: (side / patch)^2 tokens, and one for the class except in SigLIP
    *dense("ViT-B/16", TRAINING, 128, 197),
    *dense("ViT-B/16", INFERENCE, 64, 197, dtype="fp16"),
    *dense("ViT-L/16", TRAINING, 32, 577),
    *dense("ViT-L/14 CLIP", INFERENCE, 8, 577, dtype="fp16"),
    *dense("ViT-H/14", TRAINING, 64, 257),
    *dense("ViT-H/14", INFERENCE, 32, 257, dtype="fp16"),
    *dense("SigLIP so400m/14", TRAINING, 16, 729),
    *dense("SigLIP so400m/14", INFERENCE, 1, 729),
    *dense("DINOv2 ViT-L/14", TRAINING, 16, 1370),
    *dense("DINOv2 ViT-g/14", INFERENCE, 8, 1370, dtype="fp16"),
    # an image's windows of 112 x 112 pixels are the sequences
    *packed("Qwen2.5-VL vision", INFERENCE, 64, 4096),
    # Whisper: 1500 frames of audio, up to 448 tokens of text
    *dense("Whisper large-v3", TRAINING, 8, 1500),
    *dense("Whisper large-v3", TRAINING, 8, 128, 1500),
    *dense("Whisper large-v3", TRAINING, 8, 448, causal=True),
    *dense("Whisper large-v3", INFERENCE, 1, 1500, dtype="fp16"),
    *dense("Whisper large-v3", INFERENCE, 16, 1500, dtype="fp16"),
    *dense("Whisper large-v3", DECODE, 5, 1, 1500, dtype="fp16"),
    *dense("Whisper large-v3", DECODE, 5, 1, 200, dtype="fp16"),
    *dense("Whisper small", INFERENCE, 8, 1500, dtype="fp16"),
    *dense("Whisper small", DECODE, 1, 1, 1500, dtype="fp16"),
    # Diffusion: pixels / 8 (VAE) / patch, and the text's tokens where the layer joins them; 77 or
    # 512 keys are the text alone
    *dense("Stable Diffusion 1.5, level 1", TRAINING, 8, 4096),
    *dense("Stable Diffusion 1.5, level 1", INFERENCE, 2, 4096, dtype="fp16"),
    *dense("Stable Diffusion 1.5, level 1", INFERENCE, 2, 4096, 77, dtype="fp16"),
    *dense("Stable Diffusion 1.5, level 2", INFERENCE, 2, 1024, dtype="fp16"),
    *dense("Stable Diffusion 1.5, level 3", INFERENCE, 2, 256, dtype="fp16"),
    *dense("SDXL, level 2", TRAINING, 4, 4096),
    *dense("SDXL, level 2", INFERENCE, 2, 4096, dtype="fp16"),
    *dense("SDXL, level 2", INFERENCE, 2, 4096, 77, dtype="fp16"),
    *dense("SDXL, level 3", INFERENCE, 2, 1024, dtype="fp16"),
    *dense("Stable Diffusion 3 medium", INFERENCE, 2, 4429, dtype="fp16"),
    *dense("FLUX.1", TRAINING, 1, 4608),
    *dense("FLUX.1", INFERENCE, 1, 4608),
    *dense("DiT-XL/2", TRAINING, 32, 256),
    *dense("DiT-XL/2", INFERENCE, 2, 1024),
    *dense("CogVideoX-2B", INFERENCE, 2, 17776, dtype="fp16"),
    *dense("Wan2.1-14B", INFERENCE, 1, 32760),
    *dense("Wan2.1-14B", INFERENCE, 1, 75600),
    *dense("Wan2.1-14B", INFERENCE, 1, 32760, 512),
)
