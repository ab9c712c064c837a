"""Measurements of fa4_ext beside the other attention kernels that a PyTorch user has. `python -m benchmarks.attention --help`."""
