"""Memory that runs out, in our allocations, in copies, in PyTorch's kernel and in the driver: the
error is PyTorch's own in type and text, so that programs shrink their batches, and everything is
usable afterwards."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from calls import TORCH_2_12, aten, flash_backward, flash_forward, flash_forward_into, run_flash
from cases import DEVICE, Inputs, dense, make_inputs
from compare import assert_matches_reference
from fresh_process import run_script
from out_of_memory import WOULD_SHRINK, largest_batch, little_memory
from torch.nn.attention import SDPBackend, sdpa_kernel

# A tensor takes 64 MiB.
PROBLEM = dense(4096, 4096, batch=4, heads=16, heads_kv=16)


def assert_torchs_error(error: BaseException) -> None:
    assert type(error) is torch.OutOfMemoryError is torch.cuda.OutOfMemoryError, repr(error)
    assert str(error).startswith("CUDA out of memory. Tried to allocate "), str(error)
    assert all(would_shrink(error) for would_shrink in WOULD_SHRINK.values()), str(error)


def assert_out_of_memory(call, spare: int = 2**24) -> None:
    """Asserts that `call` has too little memory and then, with enough of it, succeeds."""
    with little_memory(spare), pytest.raises(RuntimeError) as raised:
        call()
    assert_torchs_error(raised.value)
    del raised
    torch.cuda.synchronize()
    call()
    torch.cuda.synchronize()


def misaligned(t: torch.Tensor) -> torch.Tensor:
    """Returns the values at an odd address, which the kernels read and write through a copy."""
    return torch.empty(t.numel() + 1, dtype=t.dtype, device=t.device)[1:].view(t.shape).copy_(t)


@pytest.mark.usefixtures("strict")
class TestOurs:
    def test_output(self):
        inputs = make_inputs(PROBLEM)
        assert_out_of_memory(lambda: flash_forward(PROBLEM, inputs))

    def test_logsumexp(self):
        """The output fits, 1 MiB of logsumexp beside it does not."""
        inputs = make_inputs(PROBLEM)
        assert_out_of_memory(lambda: flash_forward(PROBLEM, inputs), spare=inputs.q.nbytes + 2**18)

    def test_gradients(self):
        inputs = make_inputs(PROBLEM)
        forward = flash_forward(PROBLEM, inputs)
        assert_out_of_memory(lambda: flash_backward(PROBLEM, inputs, forward))

    def test_workspace(self):
        """The three gradients fit, the backward's workspace beside them does not."""
        inputs = make_inputs(PROBLEM)
        forward = flash_forward(PROBLEM, inputs)
        assert_out_of_memory(
            lambda: flash_backward(PROBLEM, inputs, forward), spare=3 * inputs.q.nbytes + 2**24
        )

    def test_copy_of_an_input(self):
        inputs = make_inputs(PROBLEM)
        shifted = Inputs(misaligned(inputs.q), inputs.k, inputs.v, inputs.do)
        assert_out_of_memory(lambda: flash_forward(PROBLEM, shifted), spare=inputs.q.nbytes + 2**24)

    @pytest.mark.skipif(not TORCH_2_12, reason="this torch has no op that writes into an output")
    def test_copy_for_a_given_output(self):
        inputs = make_inputs(PROBLEM)
        out = misaligned(inputs.q)
        assert_out_of_memory(lambda: flash_forward_into(out, PROBLEM, inputs))

    @pytest.mark.parametrize("direction", ("forward", "backward"))
    def test_everything_is_usable_afterwards(self, direction):
        inputs = make_inputs(PROBLEM)
        forward = flash_forward(PROBLEM, inputs)
        with little_memory(), pytest.raises(torch.OutOfMemoryError):
            flash_forward(PROBLEM, inputs) if direction == "forward" else flash_backward(
                PROBLEM, inputs, forward
            )
        torch.cuda.synchronize()
        again = flash_forward(PROBLEM, inputs)
        assert torch.equal(again[0], forward[0])
        del forward, again, inputs
        small = dense(239, 461)
        inputs = make_inputs(small)
        assert_matches_reference(small, inputs, run_flash(small, inputs, backward=True))


class TestStock:
    """Calls with dropout are left to PyTorch's kernel."""

    def test_forward(self, lenient):
        inputs = make_inputs(PROBLEM)
        assert_out_of_memory(lambda: flash_forward(PROBLEM, inputs, dropout_p=0.1))

    def test_backward(self, lenient):
        inputs = make_inputs(PROBLEM)
        out, lse, rng_state, unused, _ = flash_forward(PROBLEM, inputs, dropout_p=0.1)
        arguments = (
            inputs.do,
            inputs.q,
            inputs.k,
            inputs.v,
            out,
            lse,
            None,
            None,
            4096,
            4096,
            0.1,
            False,
            rng_state,
            unused,
        )
        assert_out_of_memory(lambda: aten._flash_attention_backward(*arguments))

    @pytest.mark.parametrize("direction", ("forward", "backward"))
    def test_through_scaled_dot_product_attention(self, direction, lenient):
        """PyTorch's op around the low-level one, which is ours and is left to PyTorch's in its
        turn."""
        inputs = make_inputs(PROBLEM)
        q, k, v = (t.transpose(1, 2).requires_grad_() for t in (inputs.q, inputs.k, inputs.v))

        def forward():
            with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
                return F.scaled_dot_product_attention(q, k, v, dropout_p=0.1)

        if direction == "forward":
            return assert_out_of_memory(forward)
        out = forward()
        assert_out_of_memory(
            lambda: torch.autograd.grad(
                out, (q, k, v), inputs.do.transpose(1, 2), retain_graph=True
            )
        )
        return None

    def test_same_random_numbers_after_an_error(self, lenient):
        """As without us, what failed may have drawn random numbers; what comes after a seed has
        not."""
        inputs = make_inputs(PROBLEM)
        with little_memory(), pytest.raises(torch.OutOfMemoryError):
            flash_forward(PROBLEM, inputs, dropout_p=0.1)
        results = []
        for _ in range(2):
            torch.manual_seed(5)
            results.append(flash_forward(PROBLEM, inputs, dropout_p=0.1)[0])
        assert torch.equal(*results)


def _attempt(dropout_p: float):
    """Returns a function that runs attention on a batch. Batches of up to 4 fit in 80 MiB: a tensor
    takes 16 MiB an entry, and logsumexp 1 MiB."""
    q, k, v = (torch.randn(1, 16, 4096, 128, dtype=torch.bfloat16, device=DEVICE) for _ in range(3))

    def attempt(batch: int) -> torch.Tensor:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return F.scaled_dot_product_attention(
                *(t.expand(batch, -1, -1, -1) for t in (q, k, v)), dropout_p=dropout_p
            )

    # This loads the kernel.
    attempt(1)
    return attempt


@pytest.mark.parametrize("dropout_p", (0.0, 0.1), ids=("ours", "stock"))
class TestBatchFinders:
    SPARE = 80 * 2**20

    @pytest.mark.parametrize("program", WOULD_SHRINK)
    def test_in_our_words(self, program, dropout_p, lenient):
        attempt = _attempt(dropout_p)
        with little_memory(self.SPARE):
            assert largest_batch(attempt, 64, WOULD_SHRINK[program]) == 4

    def test_accelerate(self, dropout_p, lenient):
        memory = pytest.importorskip("accelerate.utils.memory")
        attempt = _attempt(dropout_p)

        @memory.find_executable_batch_size(starting_batch_size=64)
        def find(batch_size: int) -> int:
            attempt(batch_size)
            return batch_size

        with little_memory(self.SPARE):
            # Newer versions shrink by a tenth.
            assert 1 <= find() < 64

    def test_lightning(self, dropout_p, lenient):
        memory = pytest.importorskip("lightning.pytorch.utilities.memory")
        attempt = _attempt(dropout_p)
        with little_memory(self.SPARE):
            assert largest_batch(attempt, 64, memory.is_oom_error) == 4


FULL_DEVICE = """
    import ctypes
    import torch
    import fa4_ext
    from calls import flash_forward
    from cases import DTYPES, HEAD_DIMS, MASKS, dense, make_inputs
    from itertools import product
    from compare import assert_matches_reference
    from out_of_memory import WOULD_SHRINK
    from reference import Result

    fa4_ext.register(fallback="error", speed_rules=False)
    problem = dense(129, 129, batch=1)
    inputs = make_inputs(problem)
    INPUTS = {
        (dtype, head_dim): make_inputs(dense(129, 129, batch=1, dtype=dtype, head_dim=head_dim))
        for dtype, head_dim in product(DTYPES.values(), HEAD_DIMS)
    }
    for _ in range(2):  # what the results will lie in stays with torch's allocator
        results = [torch.empty(2**20, dtype=torch.uint8, device="cuda") for _ in range(4)]
    del results
    torch.cuda.synchronize()

    driver = ctypes.CDLL("libcuda.so.1")
    held = []
    for size in (2**30, 2**26, 2**21, 2**16):
        address = ctypes.c_uint64()
        while driver.cuMemAlloc_v2(ctypes.byref(address), ctypes.c_size_t(size)) == 0:
            held.append(address.value)
    free, _ = torch.cuda.mem_get_info()
    raised = None
    # Until one no longer fits what is left.
    for dtype, head_dim, mask in product(DTYPES.values(), HEAD_DIMS, MASKS.values()):
        problem = dense(129, 129, batch=1, dtype=dtype, head_dim=head_dim, **mask)
        try:
            flash_forward(problem, INPUTS[dtype, head_dim])
        except Exception as error:
            raised = error
            break
    assert raised, f"{len(INPUTS)} kernels were loaded with {free} bytes of device memory free"
    assert type(raised) is torch.OutOfMemoryError, repr(raised)
    assert str(raised).startswith("CUDA out of memory. With "), str(raised)
    assert " loading kernel sm" in str(raised), str(raised)
    assert all(would_shrink(raised) for would_shrink in WOULD_SHRINK.values()), str(raised)
    for address in held:
        assert driver.cuMemFree_v2(ctypes.c_uint64(address)) == 0
    inputs = INPUTS[dtype, head_dim]
    out, lse, *_ = flash_forward(problem, inputs)
    assert_matches_reference(problem, inputs, Result(out, lse))
"""


def test_no_memory_for_a_kernels_code():
    """This is the first call of a process, on a device that is full."""
    run_script(FULL_DEVICE, FA4_EXT_AUTOREGISTER="0")
