"""Fingerprints on a GPU: the bits of the CPU's, by either way to make them, and what they cost a step."""

from __future__ import annotations

import statistics

import numpy as np
import pytest
import torch
from torch import Tensor

from megatron_slm.kernels import block_products, row_products
from megatron_slm.replay import fingerprint
from megatron_slm.replay.fingerprint import Sheet, digests


def tensors() -> list[Tensor]:
    """Every kind of shape, stride, start and format; on the CPU."""
    generator = torch.Generator().manual_seed(3)
    flat = torch.randn(300_001, generator=generator)
    found = [flat, flat[3:], flat[:0], flat[7], flat[:8192].view(64, 128).t(), torch.full((70_000,), -0.0)]
    found += [flat.to(dtype) for dtype in (torch.bfloat16, torch.float16, torch.float64, torch.float8_e4m3fn)]
    return [*found, torch.arange(99_999), flat > 0, flat[5:].bfloat16()[1:]]


def test_the_digests_of_equal_bits_are_equal() -> None:
    given = tensors()
    known = digests(given)
    on_gpu = [tensor.to("cuda") for tensor in given]
    assert np.array_equal(digests(on_gpu), known)
    views = torch.randn(9, 5000, device="cuda")
    assert np.array_equal(digests(list(views)), digests(list(views.cpu())))


def test_triton_is_chosen_and_torch_gives_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen, reason = block_products.choose("cuda")
    assert chosen, reason
    data, first, second = block_products.trial(torch.device("cuda"))
    assert torch.equal(
        block_products.block_products(data, first, second), block_products.reference(data, first, second)
    )
    on_gpu = [tensor.to("cuda") for tensor in tensors()]
    known = digests(on_gpu)
    monkeypatch.setattr(block_products, "choose", lambda device: (False, "not now"))
    assert np.array_equal(digests(on_gpu), known)
    print(row_products.choose("cuda")[1])


def test_what_the_digests_of_a_step_cost() -> None:
    """Prints the share (pytest -s): 0.3 billion parameters in bf16, 8,192 tokens; weights, gradients, two moments."""
    width, layers = 2048, 12
    model = torch.nn.Sequential(
        *(
            torch.nn.Sequential(torch.nn.Linear(width, 3 * width), torch.nn.GELU(), torch.nn.Linear(3 * width, width))
            for _ in range(layers)
        )
    ).to("cuda", torch.bfloat16)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    inputs, sheet = torch.randn(8192, width, device="cuda", dtype=torch.bfloat16), Sheet()

    def step() -> None:
        model(inputs).square().mean().backward()
        optimizer.step()

    def record() -> None:
        params = list(model.parameters())
        for held in (params, [param.grad for param in params]):
            sheet.add(held)
        for name in ("exp_avg", "exp_avg_sq"):
            sheet.add([optimizer.state[param][name] for param in params])
        sheet.finish()

    times: dict[str, list[float]] = {"step": [], "record": []}
    for _ in range(12):
        for name, work in (("step", step), ("record", record)):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            work()
            end.record()
            torch.cuda.synchronize()
            times[name].append(begin.elapsed_time(end))
    share = statistics.median(times["record"][2:]) / statistics.median(times["step"][2:])
    size = 4 * sum(param.numel() * param.element_size() for param in model.parameters())
    rate = size / statistics.median(times["record"][2:]) / 1e6
    print(f"digests: {100 * share:.2f} % of a step of matrix products and optimizer, {rate:.0f} GB/s")
    assert [fingerprint.ROW_BYTES, fingerprint.ROWS] == [block_products.ROW_BYTES, block_products.ROWS]
