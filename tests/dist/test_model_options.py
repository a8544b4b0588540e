"""Options of the model reach core's modules: muP's rates and logits, rotary scaling, dropout, decay groups."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from megatron_slm.train.config import OptimizerConfig
from tests.ranks import run_ranks
from tests.training import SMALL, Task, build, micro_batches, train

LR, DECAY = 1e-3, 0.1


def parameter_groups(task: Task) -> list[tuple[float, float, int]]:
    """(rate, decay, elements) of every group once half the peak rate is set."""
    from megatron_slm.train.optimizer import set_learning_rate

    _, _, optimizer = build(task)
    set_learning_rate(optimizer, LR / 2, LR)
    groups = optimizer.param_groups
    return [(g["lr"], g["weight_decay"], sum(p.numel() for p in g["params"])) for g in groups if g["params"]]


def elements(task: Task) -> dict[str, int]:
    model = task.model
    heads = (model.num_attention_heads + 2 * model.query_groups) * model.head_dim
    layer = model.hidden_size * (heads + model.hidden_size + 3 * model.ffn_size)
    return {
        "hidden": model.num_layers * layer,
        "vectors": (2 * model.num_layers + 1) * model.hidden_size,
        "vocabulary": 2 * 512 * model.hidden_size,
    }


def test_vectors_do_not_decay_and_everything_has_one_rate() -> None:
    task = Task(optimizer=OptimizerConfig(lr=LR, weight_decay=DECAY))
    counts = elements(task)
    expected = {(LR / 2, DECAY, counts["hidden"] + counts["vocabulary"]), (LR / 2, 0.0, counts["vectors"])}
    assert set(run_ranks(parameter_groups, 1, task)[0]) == expected


def test_mup_divides_the_rate_of_hidden_matrices_alone() -> None:
    model = replace(SMALL, mup_base_hidden_size=SMALL.hidden_size // 4)
    task = Task(model=model, optimizer=OptimizerConfig(lr=LR, weight_decay=DECAY))
    counts = elements(task)
    expected = {
        (LR / 2, DECAY, counts["vocabulary"]),
        (LR / 8, DECAY, counts["hidden"]),
        (LR / 2, 0.0, counts["vectors"]),
    }
    assert set(run_ranks(parameter_groups, 1, task)[0]) == expected


def logits(task: Task) -> torch.Tensor:
    groups, chunks, _ = build(task)
    batch = micro_batches(task, 0, groups)[0]
    with torch.no_grad():
        result: torch.Tensor = chunks[0](
            input_ids=batch["tokens"], position_ids=batch["position_ids"], attention_mask=None
        )
    return result


def test_mup_divides_the_logits() -> None:
    """With zero layers' worth of difference removed: the same width, another base, and init scaled back."""
    plain = run_ranks(logits, 1, Task(model=replace(SMALL, num_layers=1)))[0]
    base = SMALL.hidden_size // 4
    scaled_model = replace(SMALL, num_layers=1, mup_base_hidden_size=base)
    scaled = run_ranks(logits, 1, Task(model=scaled_model))[0]
    # Hidden matrices are half as large, so the one layer adds little; the logits are a quarter.
    ratio = (scaled.norm() / plain.norm()).item()
    assert ratio == pytest.approx(1 / 4, rel=0.05)


@pytest.mark.parametrize("layout", [{}, {"tensor_model_parallel_size": 2, "sequence_parallel": True}])
def test_mup_trains_the_same_under_every_layout(layout: dict[str, Any]) -> None:
    task = Task(model=replace(SMALL, mup_base_hidden_size=16), iters=3)
    found = run_ranks(train, 2, task.on(**layout))[0]
    expected = run_ranks(train, 1, task)[0]
    assert found.losses == pytest.approx(expected.losses, rel=1e-9, abs=0)


def frequencies(task: Task) -> torch.Tensor:
    _, chunks, _ = build(task)
    from megatron_slm.parallel.gradients import unwrap

    result: torch.Tensor = unwrap(chunks[0]).rotary_pos_emb.inv_freq
    return result


def llama3_scaled(frequency: torch.Tensor, factor: float) -> torch.Tensor:
    """Llama 3.1's published rule: long waves are stretched by ``factor``, short ones kept, between them a ramp."""
    low, high, original = 1.0, 4.0, 8192
    out = []
    for f in frequency.tolist():
        wave = 2 * math.pi / f
        if wave < original / high:
            out.append(f)
        elif wave > original / low:
            out.append(f / factor)
        else:
            smooth = (original / wave - low) / (high - low)
            out.append((1 - smooth) * f / factor + smooth * f)
    return torch.tensor(out)


def test_rotary_base_and_scaling_follow_the_published_rule() -> None:
    model = replace(SMALL, num_layers=1, hidden_size=256, num_attention_heads=2, rotary_base=500000.0)
    dimension = model.head_dim
    expected = 1.0 / 500000.0 ** (torch.arange(0, dimension, 2) / dimension)
    plain = run_ranks(frequencies, 1, Task(model=model))[0]
    torch.testing.assert_close(plain, expected.to(plain.dtype), rtol=1e-5, atol=0)
    scaled = run_ranks(frequencies, 1, Task(model=replace(model, use_rope_scaling=True, rope_scaling_factor=8.0)))[0]
    torch.testing.assert_close(scaled, llama3_scaled(expected, 8.0).to(scaled.dtype), rtol=1e-4, atol=0)
    assert not torch.allclose(scaled, plain)


def test_dropout_differs_between_replicas_and_repeats_with_the_seed() -> None:
    dropped = Task(model=replace(SMALL, hidden_dropout=0.2, attention_dropout=0.2), iters=3)
    first, second = (run_ranks(train, 2, dropped.on(tensor_model_parallel_size=2))[0] for _ in range(2))
    without = run_ranks(train, 2, Task(iters=3).on(tensor_model_parallel_size=2))[0]
    assert first.losses == second.losses and first.losses != without.losses
