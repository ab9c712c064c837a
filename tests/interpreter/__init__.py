"""Runs the PTX of compiled kernels on the CPU, so that what they compute is tested without a GPU.

program.py reads PTX, instructions.py says what an instruction does, lanes.py has the arithmetic of
a warp's 32 lanes, memory.py the memories and how TMA and WGMMA address them, machine.py warps,
CTAs and their barriers; launches.py stands behind the fake device of tests/fake_device.

It is about sums and about order, not about time: the order of warps and of asynchronous copies is
drawn at random within what the barriers allow, so that a barrier too few is a wrong number in some
run, and a circle of waits a deadlock that is reported. What it does not see: fences between
proxies, the memory model, registers, what ptxas makes of the PTX.
"""
