"""Defines what each rank of test_distributed.py runs and checks."""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from cases import DEVICE, dense, make_inputs
from compare import assert_matches_reference
from profiling import providers_of
from reference import Result
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Shard
from torch.distributed.tensor.experimental import context_parallel
from torch.distributed.tensor.experimental._attention import (
    _cp_options,
    context_parallel_unshard,
    set_rotate_method,
)
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel
from training import (
    COMPUTE_DTYPE,
    LEARNING_RATE,
    Block,
    Step,
    assert_step,
    backward,
    reference,
    snapshot,
)

SEQ_DIM = 2  # of [batch, heads, seqlen, head_dim]


def mesh() -> DeviceMesh:
    return init_device_mesh(DEVICE, (dist.get_world_size(),))


def block_and_batch() -> tuple[Block, torch.Tensor]:
    """Returns the same block and batch on every rank."""
    block, x = Block().to(DEVICE), torch.randn(4, 500, 512, device=DEVICE)
    for tensor in (x, *block.parameters()):
        dist.broadcast(tensor.detach(), src=0)
    return block, x


def assert_runs_ours(work) -> None:
    """Asserts that `work`, which is done twice on every rank, runs our kernels."""
    providers = providers_of(work)
    assert "ours" in providers and not providers & {"stock", "cudnn", "efficient"}, providers


def train(model, block, x: torch.Tensor, *, autocast: bool) -> Step:
    """Takes one step of `model` with SGD. `block` is what it wraps, whose parameters have plain
    names."""
    # DTensors beside tensors, one by one
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE, foreach=False)

    def work():
        optimizer.zero_grad()
        backward(model, x, autocast=autocast)

    assert_runs_ours(work)
    optimizer.step()
    return snapshot(block)


def own_part(x: torch.Tensor) -> torch.Tensor:
    return x.chunk(dist.get_world_size())[dist.get_rank()]


def data_parallel() -> None:
    block, x = block_and_batch()
    truth = reference(block, x, in_bf16=None)
    plain = reference(block, x, in_bf16=False, pieces=dist.get_world_size())
    model = DistributedDataParallel(block, device_ids=[torch.cuda.current_device()])
    assert_step(train(model, block, own_part(x), autocast=True), plain, truth)


def fully_sharded() -> None:
    block, x = block_and_batch()
    truth = reference(block, x, in_bf16=None)
    plain = reference(block, x, in_bf16=True, pieces=dist.get_world_size())
    policy = MixedPrecisionPolicy(param_dtype=COMPUTE_DTYPE, reduce_dtype=torch.float32)
    for module in (block.mlp, block):
        fully_shard(module, mesh=mesh(), mp_policy=policy)
    assert_step(train(block, block, own_part(x), autocast=False), plain, truth)


def tensor_parallel(attention_on: str) -> None:
    """Trains with tensor parallelism. attention_on is "tensors", a rank's own heads, or "dtensors",
    heads sharded over the mesh, so that DTensor dispatches our op."""
    block, x = block_and_batch()
    truth = reference(block, x, in_bf16=None)
    plain = reference(block, x, in_bf16=False)
    local = attention_on == "tensors"
    heads = {name: ColwiseParallel(use_local_output=local) for name in ("query", "key", "value")}
    rest = {"projection": RowwiseParallel(), "mlp.0": ColwiseParallel(), "mlp.2": RowwiseParallel()}
    parallelize_module(block, mesh(), heads | rest)
    assert block.query.weight.placements == (Shard(0),)
    assert_step(train(block, block, x, autocast=True), plain, truth)


def ring_attention(is_causal: bool, load_balance: bool, rotate_method: str) -> None:
    """Runs torch's context parallelism: each rank has a part of the sequence, keys and values go
    round, and results are merged by lse."""
    problem = dense(1024, 1024, heads=4, heads_kv=4, is_causal=is_causal)
    inputs = make_inputs(problem)
    for tensor in (inputs.q, inputs.k, inputs.v, inputs.do):
        dist.broadcast(tensor, src=0)
    _cp_options.enable_load_balance = load_balance
    set_rotate_method(rotate_method)
    parts = [t.transpose(1, 2).contiguous() for t in (inputs.q, inputs.k, inputs.v, inputs.do)]
    seq_dims = [SEQ_DIM] * 4
    with (
        context_parallel(mesh(), buffers=parts, buffer_seq_dims=seq_dims),
        sdpa_kernel(SDPBackend.FLASH_ATTENTION),
    ):
        *qkv, do = (part.clone() for part in parts)
        assert do.shape[SEQ_DIM] == problem.seqlens_q[0] // dist.get_world_size()
        for tensor in qkv:
            tensor.requires_grad_()

        def work():
            out = F.scaled_dot_product_attention(*qkv, is_causal=is_causal)
            return out.detach(), *torch.autograd.grad(out, qkv, do)

        assert_runs_ours(work)
        results = context_parallel_unshard(mesh(), list(work()), seq_dims)
    out, *gradients = (t.transpose(1, 2) for t in results)
    assert_matches_reference(problem, inputs, Result(out, None, *gradients), check_lse=False)
