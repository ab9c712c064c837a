"""The limits on a kernel's spills, waits and registers, beyond which its build fails."""

from kernels.configs_sm90 import WARPGROUP_ROWS
from kernels.kernel import Kernel, Op

# The most bytes of local memory that a thread has in the full matrix: flash-attn-4's kernels of
# packed queries for SM100 keep scheduler values there, fp16 causal D 128 most.
SPILL_BYTES_SM100_PACKED = 80
# flash-attn-4's forward for a pair of CTAs and a query's head dim of 192.
SPILL_BYTES_SM100_PAIR_192 = 16
# At D 256 accumulators leave few registers to flash-attn-4's forward, and to its backward, which
# has as many spills without our changes.
SPILL_BYTES_SM100_256 = {Op.FORWARD: 208, Op.BACKWARD: 504}


def spill_bytes(kernel: Kernel) -> int:
    if kernel.arch != 100 or kernel.op not in (Op.FORWARD, Op.BACKWARD):
        return 0
    if kernel.head_dim == 256:
        return SPILL_BYTES_SM100_256[kernel.op]
    if kernel.packed:
        return SPILL_BYTES_SM100_PACKED
    return (
        SPILL_BYTES_SM100_PAIR_192
        if kernel.op is Op.FORWARD and kernel.two_cta and kernel.head_dim == 192
        else 0
    )


def computing_warpgroups(kernel: Kernel) -> int:
    return kernel.block_m // WARPGROUP_ROWS if kernel.op is Op.FORWARD else 2


def check_registers(kernel: Kernel, at_launch: int) -> None:
    """Warpgroups that compute take the registers that the one that loads gives back. A CTA has no
    others than those of its launch, `at_launch` a thread, and would wait for more forever."""
    computing = computing_warpgroups(kernel)
    taken = computing * kernel.consumer_registers + kernel.producer_registers
    if taken > (computing + 1) * at_launch:
        raise ValueError(
            f"kernel {kernel.name} has {at_launch} registers a thread for {computing + 1} "
            f"warpgroups, and divides them into {computing} times {kernel.consumer_registers} and "
            f"{kernel.producer_registers}"
        )


def check(kernel: Kernel, facts: dict) -> None:
    check_registers(kernel, facts["registers"])
    if facts["spill_bytes"] > spill_bytes(kernel):
        raise ValueError(
            f"kernel {kernel.name} uses {facts['spill_bytes']} bytes a thread of local memory; "
            f"kernels/limits.py allows {spill_bytes(kernel)}"
        )
    # Kernels that overlap products have at most one wait per four products; the check fails above
    # one wait per two.
    if 2 * facts["waits"] > facts["products"]:
        raise ValueError(
            f"kernel {kernel.name} waits {facts['waits']} times for {facts['products']} WGMMA "
            "instructions: the compiler found no "
            "registers for more than one at a time (ptxas says C7510 or C7511)"
        )
