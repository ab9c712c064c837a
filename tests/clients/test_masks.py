"""The mask function, held to the dense masks of transformers, and the attention that reads it."""

from __future__ import annotations

import random
from functools import partial
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses import FakeTensorMode
from transformers import masking_utils as hf

from fa4_ext.integrations.transformers import attention as attention_module
from fa4_ext.integrations.transformers.compact import CompactMask, dense_mask
from fa4_ext.integrations.transformers.masks import make_mask

BATCH = 3
SEEDS = 100  # long ones are ten times as many
PATTERNS = ("causal", "window", "both ways", "full", "chunks", "packed", "packed window")
CACHES = ("none", "dynamic", "sliding", "static", "static prefill", "static sliding")
PADDINGS = ("none", "all ones", "left", "right", "both", "holes", "an empty row")


def padding_mask(kind: str, length: int, rng: random.Random) -> torch.Tensor | None:
    if kind == "none":
        return None
    mask = torch.ones(BATCH, length, dtype=torch.bool)
    for row in mask:
        first, last = sorted(rng.sample(range(length + 1), 2))
        if kind in ("left", "both"):
            row[:first] = False
        if kind in ("right", "both"):
            row[last:] = False
        if kind == "holes":
            row[first:last] = False
    if kind == "an empty row":
        mask[rng.randrange(BATCH)] = False
    return mask


def geometry(cache: str, rng: random.Random) -> dict:
    """Returns the arguments that say where queries and keys lie, and how many tokens there are."""
    queries, past = rng.choice([1, 3, 6]), rng.choice([1, 4, 7])
    if cache == "none":
        queries = rng.choice([4, 9, 12])
        return dict(q_length=queries, kv_length=queries, q_offset=0, kv_offset=0)
    if cache == "dynamic":
        return dict(q_length=queries, kv_length=past + queries, q_offset=past, kv_offset=0)
    if cache == "sliding":
        kept = rng.randrange(1, past + 1)
        return dict(
            q_length=queries, kv_length=kept + queries, q_offset=past, kv_offset=past - kept
        )
    room = past + queries + rng.choice([0, 2, 5])
    if cache == "static":
        return dict(q_length=queries, kv_length=room, q_offset=torch.tensor(past), kv_offset=0)
    if cache == "static prefill":
        return dict(q_length=queries, kv_length=room, q_offset=0, kv_offset=0)
    return dict(q_length=queries, kv_length=room, q_offset=past, kv_offset=0)


def mask_function(pattern: str, place: dict, padding: torch.Tensor | None, rng: random.Random):
    """Returns the function as transformers composes it, with the local size it tells."""
    window = rng.choice([1, 2, 3, 20])
    positions = None
    if pattern.startswith("packed"):
        rows = []
        for _ in range(BATCH):
            cuts = sorted(rng.sample(range(1, place["kv_length"]), rng.choice([0, 1, 2])))
            bounds = [0, *cuts, place["kv_length"]]
            rows.append(torch.cat([torch.arange(b - a) for a, b in pairwise(bounds)]))
        positions = torch.stack(rows)
    if pattern == "causal" or pattern == "packed":
        found = hf.causal_mask_function
    elif pattern == "full":
        found = hf.bidirectional_mask_function
    elif pattern == "both ways":
        found = hf.sliding_window_bidirectional_mask_function(window)
    elif pattern == "chunks":
        before = torch.zeros(BATCH, dtype=torch.long)
        if padding is not None:
            before = (padding.cumsum(-1) == 0).sum(-1)
        found = hf.chunked_causal_mask_function(rng.choice([2, 3, 5, 40]), before)
    else:
        found = hf.sliding_window_causal_mask_function(window)
    if positions is not None:
        sequences = (torch.diff(positions, prepend=positions[:, :1] - 1) != 1).cumsum(-1)
        found = hf.and_masks(
            hf.remap_positions_for_packed_sequence(found, positions),
            hf.packed_sequence_mask_function(sequences),
        )
    return found


def attended(tensors, mask, **options) -> torch.Tensor:
    """Returns the output of the attention function, (batch, q_length, heads, head_dim)."""
    return attention_module.attention(torch.nn.Module(), *tensors, mask, **options)[0]


def expected_of(tensors, dense: torch.Tensor) -> torch.Tensor:
    query, key, value = tensors
    key, value = (tensor.repeat_interleave(2, 1) for tensor in (key, value))
    return F.scaled_dot_product_attention(query, key, value, dense).transpose(1, 2)


def random_case(seed: int) -> tuple[str, dict, torch.Tensor | None]:
    """Returns a case's name, the arguments of the mask function, and the padding mask."""
    rng = random.Random(seed)
    pattern, cache, kind = rng.choice(PATTERNS), rng.choice(CACHES), rng.choice(PADDINGS)
    if pattern.startswith("packed"):
        cache, kind = "none", "none"
    if pattern in ("full", "both ways"):
        cache = "none"
    place = geometry(cache, rng)
    seen = int(place["q_offset"]) + place["q_length"]
    padding = padding_mask(kind, seen, rng)
    function = mask_function(pattern, place, padding, rng)
    arguments = dict(batch_size=BATCH, mask_function=function, attention_mask=padding, **place)
    return f"{pattern}, cache {cache}, padding {kind}", arguments, padding


def rows_to_compare(arguments: dict, padding: torch.Tensor | None, dense) -> torch.Tensor:
    """Returns which queries are no padding and see a key, (batch, q_length), bool."""
    first, count = int(arguments["q_offset"]), arguments["q_length"]
    some = dense.any(-1).any(1)
    if padding is None or arguments["mask_function"] is hf.bidirectional_mask_function:
        return some
    return some & padding[:, first : first + count]


@pytest.mark.parametrize(
    "seed",
    [pytest.param(n, marks=[pytest.mark.long] if n >= SEEDS else []) for n in range(10 * SEEDS)],
)
def test_a_described_mask_is_that_of_transformers_and_so_is_attention(seed, calls):
    name, arguments, padding = random_case(seed)
    mask = make_mask(**arguments)
    dense = hf.sdpa_mask(**arguments, allow_is_causal_skip=False)
    if not isinstance(mask, CompactMask):
        assert torch.equal(mask, dense), name
        return
    assert torch.equal(dense_mask(mask), dense), f"{name}: {mask}\n{dense.int()}"

    gradients = mask.lengths is None or mask.cu_seqlens_q is not None
    generator = torch.Generator().manual_seed(seed)
    tensors = [
        torch.randn(BATCH, heads, length, 8, generator=generator, requires_grad=gradients)
        for heads, length in ((4, arguments["q_length"]), *[(2, arguments["kv_length"])] * 2)
    ]
    out, expected = attended(tensors, mask), expected_of(tensors, dense)
    rows = rows_to_compare(arguments, padding, dense)
    assert out.isfinite().all(), f"{name}: padding is not finite"
    torch.testing.assert_close(out[rows], expected[rows], msg=lambda text: f"{name}: {text}")
    if gradients:
        grad = torch.randn(out.shape, generator=generator) * rows[:, :, None, None]
        got, wanted = (torch.autograd.grad(o, tensors, grad) for o in (out, expected))
        for one, other, tensor in zip(got, wanted, ("query", "key", "value"), strict=True):
            message = partial("{}, gradient of {}: {}".format, name, tensor)
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5, msg=message)
    assert (calls.kernels, calls.elsewhere) == (1, 0), f"{name}: {calls}"


def test_most_random_masks_are_described():
    masks = [make_mask(**random_case(seed)[1]) for seed in range(10 * SEEDS)]
    described = sum(isinstance(mask, CompactMask) for mask in masks)
    assert described > 6 * SEEDS, f"{described} of {10 * SEEDS}"


def hidden_everywhere(batch, head, q, k):
    return k < 0


@pytest.mark.parametrize(
    "function",
    [
        lambda b, h, q, k: k <= q,
        hf.or_masks(hf.causal_mask_function, hidden_everywhere),
        hf.and_masks(hf.causal_mask_function, hidden_everywhere),
        hf.or_masks(hf.causal_mask_function, hf.blockwise_overlay(torch.zeros(BATCH, 8).long())),
        hf.packed_sequence_mask_function(torch.zeros(BATCH, 8).long()),
        hf.padding_mask_function(torch.ones(BATCH, 8).bool()),
        hf.add_offsets_to_mask_function(hf.causal_mask_function, 1, 0),
    ],
    ids=["own", "or", "and", "blocks", "sequences without positions", "padding", "offsets"],
)
def test_a_mask_function_that_is_not_known_makes_a_dense_mask(function):
    arguments = dict(batch_size=BATCH, q_length=8, kv_length=8, mask_function=function)
    mask = make_mask(**arguments)
    assert type(mask) is torch.Tensor
    assert torch.equal(mask, hf.sdpa_mask(**arguments, allow_is_causal_skip=False))


def test_positions_that_jump_within_a_sequence_make_a_dense_mask():
    positions = torch.tensor([[0, 1, 2, 5, 6, 7]])
    function = hf.and_masks(
        hf.remap_positions_for_packed_sequence(
            hf.sliding_window_causal_mask_function(2), positions
        ),
        hf.packed_sequence_mask_function(torch.zeros(1, 6).long()),
    )
    arguments = dict(batch_size=1, q_length=6, kv_length=6, mask_function=function)
    mask = make_mask(**arguments)
    assert type(mask) is torch.Tensor
    assert torch.equal(mask, hf.sdpa_mask(**arguments, allow_is_causal_skip=False))


def test_chunks_that_start_late_without_padding_make_a_dense_mask():
    function = hf.chunked_causal_mask_function(3, torch.tensor([0, 1, 2]))
    arguments = dict(batch_size=BATCH, q_length=8, kv_length=8, mask_function=function)
    mask = make_mask(**arguments)
    assert type(mask) is torch.Tensor
    assert torch.equal(mask, hf.sdpa_mask(**arguments, allow_is_causal_skip=False))


def test_chunks_of_packed_sequences_make_a_dense_mask():
    positions = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2]])
    chunks = hf.chunked_causal_mask_function(3, torch.zeros(1).long())
    function = hf.and_masks(
        hf.remap_positions_for_packed_sequence(chunks, positions),
        hf.packed_sequence_mask_function((positions == 0).cumsum(-1)),
    )
    arguments = dict(batch_size=1, q_length=8, kv_length=8, mask_function=function)
    mask = make_mask(**arguments)
    assert type(mask) is torch.Tensor
    assert torch.equal(mask, hf.sdpa_mask(**arguments, allow_is_causal_skip=False))


def test_queries_behind_the_keys_make_a_dense_mask():
    """A cache of several predicted tokens gives queries positions that no key has yet."""
    arguments = dict(batch_size=1, q_length=2, kv_length=6, q_offset=7)
    assert type(make_mask(**arguments)) is torch.Tensor


def left_padded(length: int = 8) -> CompactMask:
    padding = torch.ones(BATCH, length, dtype=torch.bool)
    padding[0, :3] = False
    return make_mask(BATCH, length, length, attention_mask=padding)


@pytest.mark.parametrize(
    "change",
    [
        lambda mask: mask[:, :, -2:],
        lambda mask: mask & True,
        lambda mask: ~mask,
        lambda mask: mask.flip(-1),
        lambda mask: mask.expand(-1, 4, -1, -1),
        lambda mask: torch.where(mask, 0.0, -1.0),
        lambda mask: torch.zeros(mask.shape).masked_fill(mask, 1.0),
        lambda mask: torch.cat([mask, mask], -1),
        lambda mask: mask.to(torch.float32),
    ],
    ids=["slice", "and", "not", "flip", "expand", "where", "masked_fill", "cat", "to"],
)
def test_an_operation_on_a_mask_works_on_the_dense_mask(change):
    mask = left_padded()
    dense = dense_mask(left_padded())
    result = change(mask)
    assert type(result) is torch.Tensor
    assert torch.equal(result, change(dense))


@pytest.mark.parametrize(
    "keep",
    [
        lambda mask: mask.contiguous(),
        lambda mask: mask.detach(),
        lambda mask: mask.clone(),
        lambda mask: mask.to("cpu", copy=True),
    ],
    ids=["contiguous", "detach", "clone", "to"],
)
def test_a_mask_that_is_only_handed_on_stays_described(keep):
    mask = keep(left_padded())
    assert isinstance(mask, CompactMask) and mask.changed is None
    assert torch.equal(dense_mask(mask), dense_mask(left_padded()))


def test_a_mask_moves_to_another_device_with_its_tensors():
    moved = left_padded().to("meta")
    assert isinstance(moved, CompactMask)
    assert moved.device.type == moved.cu_seqlens_q.device.type == "meta"


@pytest.mark.parametrize(
    "change",
    [
        lambda mask: mask.logical_not_(),
        lambda mask: mask.__setitem__((0, 0, 5, 5), False),
        lambda mask: mask[:, 0].fill_(True),
        lambda mask: mask[:, :, :, :8].fill_(True),
    ],
    ids=["in place", "item", "view", "whole view"],
)
def test_a_mask_that_was_changed_in_place_is_not_read_by_its_description(change, calls):
    mask, dense = left_padded(), dense_mask(left_padded())
    change(mask), change(dense)
    tensors = [torch.randn(BATCH, heads, 8, 8) for heads in (4, 2, 2)]
    module = torch.nn.Module()
    module.num_key_value_groups = 2
    out = attention_module.attention(module, *tensors, mask)[0]
    assert (calls.kernels, calls.elsewhere) == (0, 1)
    torch.testing.assert_close(out, expected_of(tensors, dense).contiguous(), equal_nan=True)


READS = ("tolist", "cpu", "item", "__bool__", "__int__", "__float__")


def count_reads(monkeypatch) -> list[str]:
    """Returns a list that gets the name of every function that reads a tensor's values."""
    reads: list[str] = []

    def counting(name: str):
        original = getattr(torch.Tensor, name)

        def read(self, *arguments, **options):
            reads.append(name)
            return original(self, *arguments, **options)

        return read

    for name in READS:
        monkeypatch.setattr(torch.Tensor, name, counting(name))
    return reads


@pytest.mark.parametrize("cache", ["none", "dynamic", "static"])
def test_padding_is_read_at_once(cache, monkeypatch):
    padding = torch.ones(BATCH, 8, dtype=torch.bool)
    padding[0, :3] = False
    place = {
        "none": dict(q_length=8, kv_length=8),
        "dynamic": dict(q_length=1, kv_length=8, q_offset=7),
        "static": dict(q_length=1, kv_length=12, q_offset=torch.tensor(7)),
    }[cache]
    reads = count_reads(monkeypatch)
    mask = make_mask(BATCH, **place, attention_mask=padding)
    assert isinstance(mask, CompactMask)
    assert reads == ["tolist"], reads


@pytest.mark.parametrize("offset", [0, 3, torch.tensor(3)])
def test_nothing_is_read_without_padding(offset, monkeypatch):
    reads = count_reads(monkeypatch)
    assert isinstance(make_mask(BATCH, 5, 16, offset), CompactMask)
    assert reads == [], reads


@pytest.mark.parametrize("rows", [1, BATCH - 1, 4 * BATCH])
@pytest.mark.parametrize("kept", [6, 4])
def test_padding_with_other_rows_than_the_batch_counts_where_they_are_alike(rows, kept):
    padding = (torch.arange(6) < kept).expand(rows, -1)
    place = dict(batch_size=BATCH, q_length=6, kv_length=6, device="cpu")
    found = make_mask(**place, attention_mask=padding, allow_is_causal_skip=False)
    wanted = hf.sdpa_mask(
        **place, attention_mask=padding[:1].expand(BATCH, -1), allow_is_causal_skip=False
    )
    assert isinstance(found, CompactMask)
    assert torch.equal(dense_mask(found), wanted)


def test_an_offset_without_a_value_makes_a_dense_mask():
    place = dict(batch_size=BATCH, q_length=2, kv_length=9)
    with FakeTensorMode():
        mask = make_mask(**place, q_offset=torch.tensor(3), attention_mask=None)
        assert not isinstance(mask, CompactMask) and mask.shape[2:] == (2, 9)
