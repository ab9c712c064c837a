"""Writes docs/support.md's table of what no kernel takes."""

import torch

from scripts.documents import markdown
from scripts.documents.planner import BASE, explain_op, meta, plan

LIMITS = (
    ("head dim 264", {"head_dim": 264, "head_dim_v": 264}),
    ("head dim 576, value's 512", {"head_dim": 576, "head_dim_v": 512}),
    ("head dim 100", {"head_dim": 100, "head_dim_v": 100}),
    ("another GPU, such as 8.0", {"capability": 80}),
    ("8 query heads, 3 key/value heads", {"num_heads_kv": 3}),
    ("65,536 query heads on one key/value head", {"num_heads": 65_536, "num_heads_kv": 1}),
    ("2^30 keys", {"batch": 1, "seqlen_k": 2**30, "total_k": 2**30}),
    ("pages of 24 keys (`block_table`)", {"layout": "varlen", "page_size": 24}),
    (
        "pages on Blackwell that do not lie whole rows apart",
        {"layout": "varlen", "page_size": 64, "capability": 100, "pages_in_rows": False},
    ),
    ("4,096 queries and `num_splits` above 1", {"num_splits": 2}),
    (
        "backward, 2^24 queries of head dim 128",
        {"op": "backward", "batch": 1, "seqlen_q": 2**24, "total_q": 2**24},
    ),
    ("`attn_mask` on Blackwell", {"bias": (1, 1), "capability": 100}),
    ("`attn_mask` and `is_causal`", {"bias": (1, 1), "is_causal": True}),
    ("`attn_mask` and packed sequences", {"bias": (1, 1), "layout": "varlen"}),
)
# Arguments of aten::_flash_attention_forward, and with `peer` of another op, whose attn_bias is
# F.scaled_dot_product_attention's attn_mask.
ARGUMENTS = {
    "dropout": {"dropout_p": 0.1},
    "ALiBi": {"alibi_slopes": meta(8, dtype=torch.float32)},
    "`seqused_k` without `cum_seq_k`": {"seqused_k": meta(2, dtype=torch.int32)},
    "`attn_mask` in fp32": {"peer": "cudnn", "attn_mask": meta(512, 512, dtype=torch.float32)},
    "the gradient of an `attn_mask`": {
        "peer": "efficient",
        "backward": True,
        "attn_mask": meta(512, 512).requires_grad_(),
    },
    "`return_debug_mask`": {"return_debug_mask": True},
    "a `scale` of 0 or less": {"scale": 0.0},
    "fp32": {"tensors": (meta(2, 512, 8, 128, dtype=torch.float32),) * 3},
    "mixed dtypes": {
        "tensors": (meta(2, 512, 8, 128), *(meta(2, 512, 8, 128, dtype=torch.float16),) * 2)
    },
    "a last dimension that is not contiguous": {"tensors": (meta(2, 512, 128, 8).mT,) * 3},
    "`cu_seqlens` in int64": {
        "tensors": (meta(1024, 8, 128),) * 3,
        "cum_seq_q": meta(3, dtype=torch.int64),
        "cum_seq_k": meta(3, dtype=torch.int64),
    },
}


def limits() -> str:
    rows = [(what, plan(BASE | {"capability": 90} | change).reason) for what, change in LIMITS]
    rows += [(what, explain_op(**arguments)[2]) for what, arguments in ARGUMENTS.items()]
    return markdown.table(("not on our kernels", "reason"), *rows)
