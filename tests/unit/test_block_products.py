"""Both levels of a fingerprint in one pass: Triton's kernel, in its interpreter, gives the reference's bits."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron_slm.kernels import block_products
from megatron_slm.kernels.row_products import row_products

ROOT = Path(__file__).resolve().parents[2]
INTERPRETED = """
import torch
from megatron_slm.kernels import block_products
from megatron_slm.replay import fingerprint
data, first, second = block_products.trial(torch.device("cpu"))
assert torch.equal(block_products.block_products(data, first, second), block_products.reference(data, first, second))
tensors = [torch.randn(9000).bfloat16(), torch.zeros(0, 3), torch.randn(40, 40).t(), torch.tensor(-0.0)]
known = fingerprint.digests(tensors)
fingerprint.block_products.choose = lambda device: (True, "here")
assert (fingerprint.digests(tensors) == known).all()
second[0, 7] ^= 1
assert not torch.equal(
    block_products.block_products(data, first, second), block_products.reference(data, first, second.flip(1))
)
print("equal")
"""


def test_the_reference_is_two_products_of_rows() -> None:
    data, first, second = block_products.trial(torch.device("cpu"))
    found = []
    for part in data:
        rows = torch.nn.functional.pad(part, (0, -len(part) % block_products.BLOCK_BYTES)).view(-1, 1024)
        products = torch.zeros(len(rows), 8, dtype=torch.int32)
        out = torch.zeros(len(rows) // 32, 8, dtype=torch.int32)
        if len(rows):
            row_products(rows, first, products)
            row_products(products.view(-1).view(torch.int8).view(-1, 1024), second, out)
        found.append(out)
    assert torch.equal(torch.cat(found), block_products.reference(data, first, second))


def test_a_cpu_takes_the_two_products() -> None:
    chosen, reason = block_products.choose("cpu")
    assert not chosen and "CUDA" in reason


def test_the_kernel_gives_the_bits_of_the_reference() -> None:
    pytest.importorskip("triton", reason="triton is not installed: it comes with torch for CUDA")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", INTERPRETED], capture_output=True, text=True, env=environment)
    assert done.returncode == 0 and done.stdout == "equal\n", done.stderr
