"""Compiles causal attention ahead of time into a package for aoti.cpp: python export_aoti.py
attention.pt2

It needs no fa4_ext. On a GPU it needs the CUDA toolkit that AOTInductor compiles with.
"""

import sys

import torch
import torch.nn.functional as F


class Attention(torch.nn.Module):
    def forward(self, q, k, v):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def main(package: str) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    inputs = tuple(
        torch.randn(2, 16, 1024, 128, dtype=torch.bfloat16, device=device) for _ in range(3)
    )
    with torch.no_grad():
        program = torch.export.export(Attention(), inputs)
        torch._inductor.aoti_compile_and_package(program, package_path=package)
    print(package)


if __name__ == "__main__":
    main(*sys.argv[1:])
