"""Mixtures of experts: n ranks compute what one rank computes, in float64, however experts and tokens are divided.

Gradients are not clipped but where a test says so: core takes the norm in fp32, and the weights would show it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from megatron_slm.model.config import ModelConfig
from megatron_slm.parallel.config import ParallelConfig
from megatron_slm.train.config import OptimizerConfig, PrecisionConfig, TrainConfig
from tests.breadth import widely
from tests.pool import RankPool
from tests.training import SMALL, Outcome, Task, build, micro_batches, train, worst_difference

PLAIN = replace(SMALL, num_moe_experts=4, moe_ffn_hidden_size=96)
MIXTRAL = replace(PLAIN, moe_router_load_balancing_type="aux_loss", moe_aux_loss_coeff=0.02, moe_z_loss_coeff=1e-2)
DEEPSEEK = replace(
    SMALL,
    num_moe_experts=8,
    moe_ffn_hidden_size=32,
    moe_first_dense_layers=1,
    moe_router_topk=4,
    moe_router_num_groups=4,
    moe_router_group_topk=2,
    moe_router_score_function="sigmoid",
    moe_router_topk_scaling_factor=2.5,
    moe_router_enable_expert_bias=True,
    moe_router_bias_update_rate=0.05,
    moe_router_load_balancing_type="seq_aux_loss",
    moe_aux_loss_coeff=0.02,
    moe_shared_expert_intermediate_size=64,
    moe_shared_expert_gate=True,
)
DROPPING = replace(MIXTRAL, moe_expert_capacity_factor=0.8)
POSITION = replace(DROPPING, moe_token_drop_policy="position")

TP2 = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
PP2 = {"pipeline_model_parallel_size": 2}
VPP2 = PP2 | {"virtual_pipeline_model_parallel_size": 2}
CP2 = {"context_parallel_size": 2}
EP2 = {"expert_model_parallel_size": 2}
ETP1 = {"expert_tensor_parallel_size": 1}
GATHERED = {"moe_token_dispatcher_type": "allgather"}
REPLICATED = {"use_distributed_optimizer": False}

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "dp2": (2, {}),
    "ep2": (2, EP2),
    "tp2": (2, TP2),
    "tp2-etp1": (2, TP2 | ETP1),
    "etp2": (2, {"expert_tensor_parallel_size": 2}),
    "ep4": (4, {"expert_model_parallel_size": 4}),
    "ep2-dp2-replicated": (4, EP2 | REPLICATED),
    "ep2-dp2-overlap": (4, EP2 | {"overlap_param_gather": True, "ddp_bucket_size": 20000}),
    "ep2-tp2": (4, EP2 | TP2),
    "ep2-tp2-replicated": (4, EP2 | TP2 | REPLICATED),
    "ep4-tp2-etp1": (4, TP2 | ETP1 | {"expert_model_parallel_size": 4}),
    "ep2-tp2-etp1-allgather": (4, EP2 | TP2 | ETP1 | GATHERED),
    "ep2-pp2": (4, EP2 | PP2),
    "ep2-vpp2": (4, EP2 | VPP2),
    "ep2-cp2": (4, EP2 | CP2),
    "tp2-cp2": (4, TP2 | CP2),
}


def task(model: ModelConfig, **changes: Any) -> Task:
    return Task(**{"model": model, "iters": 2, "optimizer": OptimizerConfig(lr=1e-3, clip_grad=0.0), **changes})


class Jobs:
    """Trains on a pool of ranks; what one rank makes of a task is kept."""

    def __init__(self, pool: RankPool) -> None:
        self.pool = pool
        self._one_rank: dict[Task, Outcome] = {}

    def outcome(self, task: Task, world_size: int) -> Outcome:
        result: Outcome = self.pool.call(train, world_size, task)[0]
        return result

    def one_rank(self, task: Task) -> Outcome:
        if task not in self._one_rank:
            self._one_rank[task] = self.outcome(task, 1)
        return self._one_rank[task]

    def check(self, task: Task, layout: str) -> None:
        world_size, degrees = LAYOUTS[layout]
        check_equal(self.outcome(task.on(**degrees), world_size), self.one_rank(task))


@pytest.fixture(scope="module")
def jobs() -> Iterator[Jobs]:
    with RankPool(4) as pool:
        yield Jobs(pool)


def check_equal(found: Outcome, expected: Outcome, tolerance: float = 1e-9) -> None:
    assert found.losses == pytest.approx(expected.losses, rel=tolerance, abs=0)
    assert found.grad_norms == pytest.approx(expected.grad_norms, rel=max(tolerance, 1e-6), abs=0)
    for what, bound in (("initial", 0.0), ("gradients", tolerance), ("weights", tolerance)):
        error, name = worst_difference(getattr(found, what), getattr(expected, what))
        assert error <= bound, f"{what}: {name} differs by {error:.2e} of its norm"


@pytest.mark.parametrize("layout", [layout for layout in LAYOUTS if layout != "ep2-tp2-replicated"])
def test_balanced_experts_equal_one_rank(layout: str, jobs: Jobs) -> None:
    jobs.check(task(MIXTRAL), layout)


@pytest.mark.parametrize(
    "layout", widely(["ep2-tp2", "ep4-tp2-etp1", "ep2-vpp2", "ep2-cp2"], "ep4-tp2-etp1", "ep2-vpp2")
)
def test_grouped_experts_with_bias_and_shared_expert_equal_one_rank(layout: str, jobs: Jobs) -> None:
    """Behind a dense layer; the bias moves so far that from the second step on it chooses other experts."""
    jobs.check(task(DEEPSEEK), layout)
    expected, unbiased = jobs.one_rank(task(DEEPSEEK)), replace(DEEPSEEK, moe_router_enable_expert_bias=False)
    assert expected.losses[-1] != jobs.one_rank(task(unbiased)).losses[-1]
    assert sum(name.endswith("expert_bias") for name in expected.weights) == 3


@pytest.mark.parametrize(("model", "layout"), [(DROPPING, "ep2-tp2"), (DROPPING, "tp2-cp2"), (POSITION, "ep2-cp2")])
def test_dropped_tokens_are_those_of_one_rank(model: ModelConfig, layout: str, jobs: Jobs) -> None:
    jobs.check(task(model), layout)
    assert jobs.one_rank(task(model)).losses[-1] != jobs.one_rank(task(MIXTRAL)).losses[-1], "nothing was dropped"


def test_experts_in_every_second_layer_equal_one_rank(jobs: Jobs) -> None:
    """Interleaved over four chunks of one layer, of which two hold no expert at all."""
    mixed = task(replace(MIXTRAL, moe_layer_freq=2, swiglu=False))
    jobs.check(mixed, "ep2-vpp2")
    names = jobs.one_rank(mixed).weights
    assert "decoder.layers.0.mlp.router.weight" in names and "decoder.layers.1.mlp.linear_fc1.weight" in names


RECOMPUTE = {
    "full": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
    "experts": {"recompute_granularity": "selective", "recompute_modules": ("moe", "shared_experts")},
}


@pytest.mark.parametrize("recompute", RECOMPUTE)
def test_recompute_changes_nothing_and_counts_once(recompute: str, jobs: Jobs) -> None:
    """The bias moves by what was counted; a forward pass counted twice would only scale it, so tokens are dropped."""
    model = replace(DEEPSEEK, moe_expert_capacity_factor=1.0, moe_z_loss_coeff=1e-2)
    recomputed = TrainConfig(global_batch_size=4, **RECOMPUTE[recompute])
    check_equal(jobs.outcome(task(model, train=recomputed).on(**EP2, **TP2), 4), jobs.one_rank(task(model)))


def test_losses_of_samples_do_not_depend_on_the_micro_batch(jobs: Jobs) -> None:
    whole = TrainConfig(global_batch_size=4, micro_batch_size=4)
    check_equal(jobs.outcome(task(DEEPSEEK, train=whole), 1), jobs.one_rank(task(DEEPSEEK)))


def test_router_losses_have_the_gradient_of_their_definition(jobs: Jobs) -> None:
    """The gradient of the losses alone: that of the objective with them minus that without, against plain autograd."""
    batch = TrainConfig(global_batch_size=1)
    model = replace(MIXTRAL, num_layers=1, moe_z_loss_coeff=0.03)
    layout = TP2 | EP2 | ETP1
    without = task(replace(PLAIN, num_layers=1), train=batch, iters=1)
    difference = {}
    for name, world_size, degrees in (("one", 1, {}), ("two", 2, layout)):
        found = jobs.outcome(replace(without, model=model).on(**degrees), world_size).gradients
        bare = jobs.outcome(without.on(**degrees), world_size).gradients
        difference[name] = found["decoder.layers.0.mlp.router.weight"] - bare["decoder.layers.0.mlp.router.weight"]
    expected = jobs.pool.call(definition, 1, replace(without, model=model))[0]
    torch.testing.assert_close(difference["two"], difference["one"], rtol=1e-9, atol=1e-15)
    for found in difference.values():
        torch.testing.assert_close(found, expected, rtol=1e-7, atol=0.0)  # core divides by the tokens in fp32


def definition(task: Task) -> torch.Tensor:
    """Gradient of tokens x (aux + z loss) / loss tokens with respect to the router, from its inputs alone."""
    from megatron_slm.parallel.router import routers

    groups, chunks, _ = build(task)
    batch = micro_batches(task, 0, groups)[0]
    (router,) = routers(chunks)
    seen: list[torch.Tensor] = []
    router.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0].detach()))
    chunks[0](
        input_ids=batch["tokens"],
        position_ids=batch["position_ids"],
        attention_mask=None,
        labels=batch["labels"],
        loss_mask=batch["loss_mask"],
    )
    weight = router.weight.detach().clone().requires_grad_()
    logits = seen[0].flatten(0, 1) @ weight.T
    tokens, experts = logits.shape
    scores = logits.softmax(dim=-1)
    top = torch.zeros_like(scores).scatter(1, scores.topk(2, dim=-1).indices, 1.0)
    aux = experts * ((top.sum(0) / (2 * tokens)) * scores.mean(0)).sum()
    z = logits.logsumexp(dim=-1).square().mean()
    objective = tokens * (task.model.moe_aux_loss_coeff * aux + task.model.moe_z_loss_coeff * z)
    (gradient,) = torch.autograd.grad(objective / batch["loss_mask"].sum().double(), weight)
    return gradient


@pytest.mark.parametrize("layout", ["ep2-tp2", "ep2-tp2-replicated", "tp2-etp1"])
def test_both_optimizers_clip_by_one_norm(layout: str, jobs: Jobs) -> None:
    """In fp32, as the norm is; clipped to a hundredth, by experts and dense weights together."""
    clipped = task(MIXTRAL, optimizer=OptimizerConfig(lr=1e-3, adam_eps=1e-3, clip_grad=0.01))
    world_size, degrees = LAYOUTS[layout]
    check_equal(jobs.outcome(clipped.on(**degrees), world_size), jobs.one_rank(clipped), 2e-6)
    unclipped = jobs.one_rank(replace(clipped, optimizer=replace(clipped.optimizer, clip_grad=0.0)))
    assert worst_difference(jobs.one_rank(clipped).weights, unclipped.weights)[0] > 1e-4


def test_bf16_trains_like_one_rank(jobs: Jobs) -> None:
    """A token whose two best experts are almost equally probable may go to the other one: a gradient may differ."""
    half = task(MIXTRAL, precision=PrecisionConfig(bf16=True), iters=4)
    found, expected = jobs.outcome(half.on(**EP2, **TP2), 4), jobs.one_rank(half)
    assert found.losses == pytest.approx(expected.losses, rel=2e-3, abs=0)
    assert abs(expected.losses[-1] / expected.losses[0] - 1.0) > 2e-3, "nothing was learned, so nothing was compared"


def test_mup_divides_the_rate_of_experts_and_leaves_the_router(jobs: Jobs) -> None:
    wide = task(replace(DEEPSEEK, mup_base_hidden_size=16))
    jobs.check(wide, "ep2-tp2")
    narrow, scaled = jobs.one_rank(task(DEEPSEEK)).initial, jobs.one_rank(wide).initial
    ratios = {name: float(scaled[name].norm() / narrow[name].norm()) for name in narrow if narrow[name].norm()}
    for name, ratio in ratios.items():
        hidden = any(part in name for part in ("linear_fc", "linear_qkv", "linear_proj"))
        assert ratio == pytest.approx(0.5 if hidden and not name.endswith("norm_weight") else 1.0, rel=1e-9), name


def skipped_step(task: Task) -> list[torch.Tensor]:
    """The biases after a step that was not made and one that was; after the second alone; and in an evaluation."""
    from megatron_slm.parallel.gradients import zero_gradients
    from megatron_slm.parallel.pipeline import run_schedule
    from megatron_slm.parallel.router import routers
    from megatron_slm.stages import pretrain
    from megatron_slm.train.optimizer import apply_update, gradient_norm

    groups, chunks, optimizer = build(task)

    def forward_backward(step: int, *, forward_only: bool = False) -> None:
        run_schedule(
            chunks,
            micro_batches(task, step, groups),
            pretrain.loss,
            forward_only=forward_only,
            seq_length=task.model.seq_length,
            groups=groups,
        )

    def biases() -> torch.Tensor:
        return torch.stack([router.expert_bias.clone() for router in routers(chunks)])

    zero_gradients(chunks)
    forward_backward(0)
    untouched = biases()
    zero_gradients(chunks)
    forward_backward(1)
    for chunk in chunks:
        chunk.eval()
    with torch.no_grad():
        forward_backward(2, forward_only=True)
    apply_update(optimizer, gradient_norm(optimizer))
    loads = torch.stack([router.counted[:8] for router in routers(chunks) if router.counted is not None])
    return [untouched, biases(), loads]


def test_a_step_that_is_not_made_leaves_the_bias_alone(jobs: Jobs) -> None:
    untouched, moved, loads = jobs.pool.call(skipped_step, 1, task(DEEPSEEK))[0]
    assert not untouched.any()
    assert loads.sum(dim=-1).tolist() == [4 * 32 * 4] * 3, "four samples of 32 tokens, each sent to four experts"
    assert moved.equal(0.05 * torch.sign(loads.mean(dim=-1, keepdim=True) - loads).float())


def expert_groups(parallel: ParallelConfig) -> dict[str, list[int]]:
    """The ranks of this rank's expert groups, as core has made them."""
    import torch.distributed as dist

    from megatron_slm.parallel.groups import build_groups

    groups = build_groups(parallel)
    named = {"etp": groups.expt_tp, "ep": groups.ep, "edp": groups.expt_dp, "etp-ep": groups.tp_ep}
    return {name: dist.get_process_group_ranks(group) for name, group in named.items()}


@pytest.mark.parametrize("degrees", [EP2 | TP2, EP2 | TP2 | ETP1, {"expert_tensor_parallel_size": 2} | EP2, EP2 | PP2])
def test_the_layout_names_the_groups_that_core_makes(degrees: dict[str, Any], jobs: Jobs) -> None:
    from megatron_slm.parallel.layout import Layout

    parallel = ParallelConfig(**degrees)
    layout = Layout.from_config(parallel, 4)
    for rank, found in enumerate(jobs.pool.call(expert_groups, 4, parallel)):
        assert found == {axis: list(layout.ranks_of(axis, rank)) for axis in found}
