"""Random calls of PyTorch's flash attention ops, each checked against fp32 math or against
PyTorch's own kernel.

`python tests/gpu/fuzz --help` is the long run, tests/gpu/test_fuzz.py a short one. case.py says
what a call is; generate.py makes them from a seed, faults.py makes them illegal; tensors.py and
ops.py run them, check.py judges, runner.py counts.
"""
