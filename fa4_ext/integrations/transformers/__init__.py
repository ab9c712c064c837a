"""Attention of Hugging Face transformers on this library's kernels.

    from fa4_ext.integrations.transformers import register

    register()
    model = AutoModelForCausalLM.from_pretrained(..., attn_implementation="fa4_ext")

The kernels run padded and packed batches, sliding windows, caches, grouped heads and sinks.
transformers' own sdpa runs everything else, with the whole mask: dropout, position biases, custom
masks, float32, and on the CPU; a soft cap needs the model's own eager attention. Where a token of
padding is hidden from all others, its own output is finite, but otherwise unspecified, as with
transformers' flash attention.

The name "fa4_ext" works wherever a library hands `attn_implementation` on. Where a library has a
list of names, it does not know this one:

- transformers splits the images of a vision tower into a call each, unless "flash" is in the name;
  `join_vision_calls` undoes that. Its continuous batching takes "sdpa" and flash attention only.
- sentence-transformers 6.2 runs padded batches, and does not flatten them: `_can_flatten_inputs`
  in base/modules/transformer.py would have to accept the name where it asks
  `_is_flash_attention_requested`.
- accelerate 1.15 takes no such name for sequence parallelism: `_builtin_sp_attn` of
  `ParallelismConfig` in utils/dataclasses.py would have to hold it. Use "sdpa" there.
- TRL 1.16 has no such list: packing and padding-free training run on the kernels.
"""

from __future__ import annotations

from fa4_ext.integrations.transformers._register import (
    TESTED_VERSIONS,
    join_vision_calls,
    register,
)

__all__ = ["TESTED_VERSIONS", "join_vision_calls", "register"]
