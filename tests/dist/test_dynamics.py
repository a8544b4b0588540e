"""Norms of layers and the noise scale: the same numbers under every layout, and training goes on as if unmeasured."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_slm.model.config import ModelConfig
from megatron_slm.parallel.config import ParallelConfig
from megatron_slm.train.config import PrecisionConfig, TrainConfig
from tests import runs
from tests.ranks import run_ranks
from tests.training import SMALL, Task, build, global_tensors, micro_batches, with_full_parameters

# Two samples a micro-batch over all data-parallel ranks, whatever the layout: the noise scale's small batch.
TWO = TrainConfig(micro_batch_size=2, global_batch_size=8)
ONE = TrainConfig(micro_batch_size=1, global_batch_size=8)

GPT2 = ModelConfig(
    num_layers=4,
    hidden_size=64,
    num_attention_heads=4,
    seq_length=32,
    position_embedding_type="learned_absolute",
    normalization="LayerNorm",
    swiglu=False,
    openai_gelu=True,
    add_bias_linear=True,
    untie_embeddings_and_output_weights=False,
)
LLAMA = Task(iters=2, train=TWO)
TIED = Task(iters=2, train=TWO, model=GPT2)
PREDICTING = Task(iters=2, train=TWO, model=replace(SMALL, mtp_num_layers=1))

TP2: dict[str, Any] = {"tensor_model_parallel_size": 2}
PP2: dict[str, Any] = {"pipeline_model_parallel_size": 2}
VPP2: dict[str, Any] = PP2 | {"virtual_pipeline_model_parallel_size": 2}
SP: dict[str, Any] = {"sequence_parallel": True}
LAYOUTS: dict[str, tuple[int, dict[str, Any], TrainConfig]] = {
    "tp2": (2, TP2, TWO),
    "tp2-sp": (2, TP2 | SP, TWO),
    "pp2-vpp2": (2, VPP2, ONE),
    "dp2-overlap": (2, {"overlap_param_gather": True, "ddp_bucket_size": 20000}, ONE),
    "dp2-no-distributed-optimizer": (2, {"use_distributed_optimizer": False}, ONE),
    "tp2-pp2-sp": (4, TP2 | PP2 | SP, TWO),
    "tp2-dp2-no-distributed-optimizer": (4, TP2 | {"use_distributed_optimizer": False}, ONE),
}


@dataclass(frozen=True)
class Place:
    """What a step asks of its cursor; the samples are made up."""

    consumed_samples: int
    skipped_samples: int = 0
    rolling_digest: str = ""


@dataclass
class Measured:
    """Records by step, and what the training itself has come to."""

    layers: list[dict[str, Any]]
    noise: list[dict[str, Any]]
    losses: list[float]
    grad_norms: list[float]
    weights: dict[str, torch.Tensor]


def measure(task: Task, interval: int | None = 1) -> Measured:
    """Train with both hooks (or none of them); every rank returns what it was given to write."""
    from megatron_slm.stages import pretrain
    from megatron_slm.train.guard import Guard
    from megatron_slm.train.hook import Hook
    from megatron_slm.train.layer_norms import LayerNorms
    from megatron_slm.train.noise_scale import NoiseScale
    from megatron_slm.train.optimizer_state import initialise_state
    from megatron_slm.train.random_state import RandomState
    from megatron_slm.train.step import StepInput, StepPlan, TrainState, train_step

    groups, chunks, optimizer = build(task)
    initialise_state(optimizer)
    random = RandomState(task.train.seed, dp_rank=groups.dp.rank(), pp_rank=groups.pp.rank())
    state = TrainState(chunks, optimizer, random, Place(0))  # type: ignore[arg-type]
    plan = StepPlan(
        loss=pretrain.loss,
        learning_rate=lambda step: task.optimizer.lr,
        peak_learning_rate=task.optimizer.lr,
        seq_length=task.model.seq_length,
        groups=groups,
        device=torch.device("cpu"),
    )
    found = Measured([], [], [], [], {})
    hooks: list[Hook] = []
    if interval is not None:
        depths = task.model.mtp_num_layers or 0
        layers = LayerNorms(interval, task.model.num_layers, groups, found.layers.append, predictions=depths)
        hooks = [NoiseScale(interval, plan, found.noise.append), layers]
    for step in range(task.iters):
        inputs = StepInput(
            micro_batches(task, step, groups),
            Place((step + 1) * task.train.global_batch_size),  # type: ignore[arg-type]
        )
        guard = Guard(replace(task.train, spike_policy="off"))
        result = train_step(state, plan, lambda inputs=inputs: inputs, guard, hooks).result  # type: ignore[misc]
        for hook in hooks:
            hook.after_step(state, result)
        found.losses.append(result.loss)
        found.grad_norms.append(result.grad_norm)
    with_full_parameters(chunks)
    found.weights = global_tensors(chunks)
    dist.barrier()
    return found


@cache
def measured(task: Task, world_size: int) -> Measured:
    """What every rank has been told, which must be the same."""
    results: list[Measured] = run_ranks(measure, world_size, task)
    assert all(other.layers == results[0].layers and other.noise == results[0].noise for other in results)
    return results[0]


def one_rank(task: Task) -> Measured:
    return measured(replace(task, parallel=ParallelConfig(), train=TWO), 1)


def flat(record: dict[str, Any]) -> dict[str, float]:
    """{"grad_norm": {"layer_0": x}} -> {"grad_norm/layer_0": x}."""
    return {
        f"{quantity}/{part}": value
        for quantity, values in record.items()
        if isinstance(values, dict)
        for part, value in values.items()
    }


TIED_TOO = ("pp2-vpp2", "tp2-pp2-sp")
"""Layouts in which the embedding and the output layer that it is tied to lie on different ranks."""


@pytest.mark.parametrize(
    ("family", "layout"),
    [*(("llama", name) for name in LAYOUTS), *(("tied", name) for name in TIED_TOO), ("predicting", "tp2-pp2-sp")],
)
def test_every_layout_measures_what_one_rank_does(family: str, layout: str) -> None:
    """In float64, where two layouts differ by the order of sums and by the norm that core clips with, in fp32."""
    world_size, degrees, train = LAYOUTS[layout]
    task = {"llama": LLAMA, "tied": TIED, "predicting": PREDICTING}[family]
    found, expected = measured(replace(task.on(**degrees), train=train), world_size), one_rank(task)
    for step in range(task.iters):
        assert flat(found.layers[step]) == pytest.approx(flat(expected.layers[step]), rel=1e-8, abs=0)
        # Core takes the whole gradient's norm in fp32, and the estimates are differences of two of them.
        small, big = (flat(record.noise[step]) for record in (found, expected))
        scale = {name: abs(big[name]) for name in ("noise_scale/gradient_squared", "noise_scale/trace")}
        for name, size in scale.items():
            assert small[name] == pytest.approx(big[name], rel=1e-5, abs=1e-5 * size)


@pytest.mark.parametrize(
    ("layout", "bf16"), [("tp2-sp", False), ("dp2-overlap", False), ("pp2-vpp2", False), ("dp2-overlap", True)]
)
def test_half_and_single_precision_stay_within_their_own_noise(layout: str, bf16: bool) -> None:
    world_size, degrees, train = LAYOUTS[layout]
    task = replace(LLAMA, precision=PrecisionConfig(bf16=bf16))
    found = measured(replace(task.on(**degrees), train=train), world_size)
    expected = one_rank(task)
    assert flat(found.layers[0]) == pytest.approx(flat(expected.layers[0]), rel=5e-3 if bf16 else 1e-6, abs=0)


@pytest.mark.parametrize("task", [LLAMA, TIED, PREDICTING])
def test_layers_add_up_to_the_global_norm(task: Task) -> None:
    found = one_rank(task)
    for record, norm in zip(found.layers, found.grad_norms, strict=True):
        squares = sum(value**2 for value in record["grad_norm"].values())
        assert math.sqrt(squares) == pytest.approx(norm, rel=1e-6)


def direct(task: Task) -> dict[str, float]:
    """The first step's values on one rank by another way: torch's autograd and layers called one by one."""
    from megatron_slm.parallel.gradients import unwrap

    groups, chunks, optimizer = build(task)
    model = unwrap(chunks[0])
    batches = micro_batches(task, 0, groups)
    tokens = sum(float(batch["loss_mask"].sum()) for batch in batches)
    squares: dict[str, float] = {}
    elements = 0
    total = torch.zeros((), dtype=torch.float64)
    for batch in batches:
        outputs = {"embedding": model.embedding(batch["tokens"], batch["position_ids"])}
        rotary = model.rotary_pos_emb(task.model.seq_length)
        hidden = outputs["embedding"]
        for number, layer in enumerate(model.decoder.layers):
            hidden, _ = layer(hidden, attention_mask=None, rotary_pos_emb=rotary)
            outputs[f"layer_{number}"] = hidden
        outputs["final_norm"] = model.decoder.final_layernorm(hidden)
        for part, output in outputs.items():
            squares[part] = squares.get(part, 0.0) + float(output.detach().square().sum())
        elements += hidden.numel()
        logits = (outputs["final_norm"] @ model.output_layer.weight.t())[..., :500].transpose(0, 1)
        losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten(), reduction="none")
        total = total + (losses * batch["loss_mask"].flatten()).sum() / tokens
    named = list(model.named_parameters())
    gradients = torch.autograd.grad(total, [param for _, param in named])
    found = {f"activation_rms/{part}": math.sqrt(value / elements) for part, value in squares.items()}
    norm = math.sqrt(sum(float(gradient.square().sum()) for gradient in gradients))
    clip = min(1.0, task.optimizer.clip_grad / (norm + 1e-6))
    sums: dict[str, list[float]] = {}
    for (name, param), gradient in zip(named, gradients, strict=True):
        words = name.split(".")
        part = f"layer_{words[2]}" if words[1] == "layers" else {"decoder": "final_norm"}.get(words[0], words[0])
        # AdamW's first step: both moments are the gradient's own.
        step = clip * gradient / ((clip * gradient).abs() + task.optimizer.adam_eps)
        decay = task.optimizer.weight_decay * param if param.dim() > 1 else 0.0
        update = task.optimizer.lr * (step + decay)
        row = sums.setdefault(part, [0.0, 0.0, 0.0])
        for column, tensor in enumerate((gradient, update, param)):
            row[column] += float(tensor.detach().square().sum())
    for part, row in sums.items():
        gradient_norm, update_norm, weight_norm = map(math.sqrt, row)
        found |= {f"grad_norm/{part}": gradient_norm, f"update_norm/{part}": update_norm}
        found |= {f"weight_norm/{part}": weight_norm, f"update_ratio/{part}": update_norm / weight_norm}
    return found


def test_one_rank_equals_a_direct_computation() -> None:
    expected: dict[str, float] = run_ranks(direct, 1, replace(LLAMA, iters=1))[0]
    # Core clips by a norm in fp32, so the update is known to fp32's precision only where epsilon matters.
    assert flat(one_rank(LLAMA).layers[0]) == pytest.approx(expected, rel=1e-6, abs=0)


@pytest.mark.parametrize("layout", ["tp2-sp", "pp2-vpp2", "dp2-overlap"])
def test_measuring_changes_no_bit(layout: str) -> None:
    """With dropout, whose random numbers the extra micro-batch must not use up."""
    world_size, degrees, train = LAYOUTS[layout]
    model = replace(SMALL, hidden_dropout=0.1, attention_dropout=0.1)
    task = replace(LLAMA.on(**degrees), model=model, train=train, iters=4, precision=PrecisionConfig())
    plain = run_ranks(measure, world_size, task, None)[0]
    watched = run_ranks(measure, world_size, task, 2)[0]
    assert [record["step"] for record in watched.layers] == [record["step"] for record in watched.noise] == [2, 4]
    assert watched.losses == plain.losses and watched.grad_norms == plain.grad_norms
    assert all(watched.weights[name].equal(plain.weights[name]) for name in plain.weights)


def test_the_small_batch_is_the_first_micro_batch() -> None:
    """A run whose whole step is that micro-batch has its norm."""
    from megatron_slm.train.noise_scale import estimate

    found = one_rank(LLAMA)
    # The samples of a made-up global batch depend on its size, so the small one is cut out of the same eight.
    small = run_ranks(first_norm, 1, LLAMA)[0]
    expected = estimate((2, small**2), (8, found.grad_norms[0] ** 2))
    record = found.noise[0]["noise_scale"]
    assert record["trace"] == pytest.approx(expected.trace, rel=1e-6)
    assert record["gradient_squared"] == pytest.approx(expected.gradient_squared, rel=1e-6)
    assert record["average_trace"] == pytest.approx(expected.trace, rel=1e-6)


def first_norm(task: Task) -> float:
    from megatron_slm.parallel.pipeline import run_schedule
    from megatron_slm.stages import pretrain
    from megatron_slm.train.optimizer import gradient_norm

    groups, chunks, optimizer = build(task)
    batches = micro_batches(task, 0, groups)[:1]
    run_schedule(chunks, batches, pretrain.loss, forward_only=False, seq_length=task.model.seq_length, groups=groups)
    return gradient_norm(optimizer)


def test_a_resumed_run_writes_what_an_uninterrupted_one_does(tmp_path: Path) -> None:
    """Averages and all, into ``dynamics.jsonl``."""
    data = runs.corpus(tmp_path)
    own = ("train.eval_iters=0", "log.tensorboard=false", "log.noise_scale_interval=1", "log.layer_norms_interval=3")
    tp2 = ("parallel.tensor_model_parallel_size=2", "parallel.sequence_parallel=true")
    assert runs.train(tmp_path / "whole", data, 2, "train.train_iters=6", *own, *tp2) == 0
    assert runs.train(tmp_path / "parts", data, 2, "train.train_iters=6", "train.exit_interval=4", *own, *tp2) == 75
    assert runs.train(tmp_path / "parts", data, 2, "train.train_iters=6", *own, *tp2) == 0
    whole, parts = (runs.records(tmp_path / name, "dynamics.jsonl") for name in ("whole", "parts"))
    assert [record["step"] for record in whole] == [1, 2, 3, 3, 4, 5, 6, 6]
    assert set(whole[-1]["grad_norm"]) == {"embedding", "final_norm", "output_layer", *(f"layer_{n}" for n in range(4))}
    assert parts == whole
