"""The dry world: any rank of any job in one process, left without a trace, and no substitution without its reason."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from megatron_slm.config.load import load
from megatron_slm.config.run_config import RunConfig
from megatron_slm.parallel import device

device.preload("cpu")

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from megatron.core import parallel_state  # noqa: E402
from megatron.core.optimizer import clip_grads  # noqa: E402
from megatron.core.tensor_parallel import mappings  # noqa: E402
from megatron.core.transformer import multi_token_prediction  # noqa: E402
from megatron.core.transformer.moe import moe_utils, token_dispatcher  # noqa: E402
from torch._subclasses.fake_tensor import FakeTensor  # noqa: E402

from megatron_slm import run, run_model  # noqa: E402
from megatron_slm.memory.rank import trace_rank  # noqa: E402
from megatron_slm.parallel import dry  # noqa: E402
from megatron_slm.parallel.router import Router  # noqa: E402

SMALL = (
    "model.num_layers=2", "model.hidden_size=64", "model.num_attention_heads=4", "model.seq_length=32",
    "model.vocab_size=500", "train.global_batch_size=2", "parallel.world_size=2",
)  # fmt: skip
EXPERTS = (
    "model.num_moe_experts=4", "model.moe_ffn_hidden_size=32", "model.moe_router_topk=2",
    "parallel.expert_model_parallel_size=2",
)  # fmt: skip

SYMBOLS: dict[str, tuple[Any, str]] = {
    "torch.distributed.all_gather_object": (dist, "all_gather_object"),
    "nn.Module._apply": (torch.nn.Module, "_apply"),
    "clip_grads.l2_norm_impl": (clip_grads, "l2_norm_impl"),
    "moe_utils.topk_routing_with_score_function": (moe_utils, "topk_routing_with_score_function"),
    "token_dispatcher.sort_chunks_by_idxs": (token_dispatcher, "sort_chunks_by_idxs"),
    "mappings._gather_along_first_dim": (mappings, "_gather_along_first_dim"),
    "Router._within_capacity": (Router, "_within_capacity"),
    "{MoEAux,MTP}LossAutoScaler.main_loss_backward_scale": (
        moe_utils.MoEAuxLossAutoScaler,
        "main_loss_backward_scale",
    ),
    "torch.UntypedStorage.copy_": (torch.UntypedStorage, "copy_"),
}
"""Where each substitution is."""
SCALE = "{MoEAux,MTP}LossAutoScaler.main_loss_backward_scale"


def config(*overrides: str) -> RunConfig:
    return load(None, list({item.split("=")[0]: item for item in (*SMALL, *overrides)}.values())).config


def trace(one: RunConfig, rank: int = 0) -> Any:
    world = one.parallel.world_size or 1
    return trace_rank(
        one, run_model.build_model, run.step_plan, rank=rank, world_size=world, vocab_size=one.model.vocab_size or 0
    )


def test_every_substitution_is_known_here() -> None:
    assert {one.symbol for one in dry.DRY_SUBSTITUTIONS} == set(SYMBOLS)


def test_the_world_leaves_everything_as_it_was() -> None:
    before = {symbol: getattr(owner, name) for symbol, (owner, name) in SYMBOLS.items()}
    with pytest.raises(ValueError, match="planted"), dry.dry_world(config().parallel, rank=1, world_size=2):
        during = {symbol: getattr(owner, name) for symbol, (owner, name) in SYMBOLS.items()}
        assert isinstance(torch.ones(3), FakeTensor)
        assert dist.get_rank() == 1 and dist.get_world_size() == 2
        raise ValueError("planted")
    assert [symbol for symbol in SYMBOLS if during[symbol] is before[symbol]] == [SCALE], "it was none before, too"
    assert {symbol: getattr(owner, name) for symbol, (owner, name) in SYMBOLS.items()} == before
    assert not isinstance(torch.ones(3), FakeTensor)
    assert not dist.is_initialized() and not parallel_state.model_parallel_is_initialized()


CASES: dict[str, tuple[str, ...]] = {
    "torch.distributed.all_gather_object": ("model.position_embedding_type=learned_absolute",),
    "nn.Module._apply": ("precision.bf16=true", *EXPERTS),
    "clip_grads.l2_norm_impl": (),
    "moe_utils.topk_routing_with_score_function": EXPERTS,
    "token_dispatcher.sort_chunks_by_idxs": EXPERTS,
    "mappings._gather_along_first_dim": EXPERTS,
    "Router._within_capacity": (
        *EXPERTS, "model.moe_expert_capacity_factor=0.5", "parallel.tensor_model_parallel_size=2",
        "parallel.sequence_parallel=true", "parallel.expert_tensor_parallel_size=1",
    ),
    "torch.UntypedStorage.copy_": (
        "model.multi_latent_attention=true", "model.kv_lora_rank=16", "model.qk_head_dim=16",
        "model.qk_pos_emb_head_dim=8", "model.v_head_dim=16", "train.recompute_granularity=selective",
        "train.recompute_modules=[mla_up_proj]",
    ),
}  # fmt: skip
"""Substitution -> a configuration that needs it."""


def sizes(one: RunConfig) -> list[int]:
    """What a step allocates."""
    found = trace(one)
    return [found.blocks[event].size for phase in found.phases.values() for event in phase.events if event >= 0]


@pytest.mark.parametrize("symbol", CASES)
def test_the_reason_of_a_substitution_is_still_there(symbol: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without it, the same configuration ends in an error, or keeps or allocates something else."""
    one = config(*CASES[symbol])
    expected = trace(one)
    assert outline(trace(one)) == outline(expected), "the same configuration gives the same trace"
    with without(symbol, monkeypatch):
        try:
            found = trace(one)
        except Exception:  # noqa: BLE001  whatever it is, the substitution prevents it
            return
    assert outline(found) != outline(expected)


def outline(found: Any) -> list[Any]:
    """What a trace allocates and releases."""
    return [
        [(event >= 0, found.blocks[event if event >= 0 else ~event].size) for event in phase.events]
        for phase in found.phases.values()
    ] + [len(found.persistent)]


@contextlib.contextmanager
def without(symbol: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The dry world with one substitution less."""
    owner, name = SYMBOLS[symbol]
    original = getattr(owner, name)
    substituted = dry._substituted

    @contextlib.contextmanager
    def fewer() -> Iterator[None]:
        with substituted():
            becomes = getattr(owner, name)
            setattr(owner, name, original)
            try:
                yield
            finally:
                setattr(owner, name, becomes)

    with monkeypatch.context() as patched:
        patched.setattr(dry, "_substituted", fewer)
        yield


@pytest.mark.parametrize(("rank", "stage"), [(0, 0), (8191, 7), (16383, 15)])
def test_any_rank_of_many_thousands(rank: int, stage: int) -> None:
    one = config(
        "model.num_layers=32", "model.num_query_groups=4", "model.num_attention_heads=8", "model.hidden_size=128",
        "parallel.world_size=16384", "parallel.tensor_model_parallel_size=4", "parallel.sequence_parallel=true",
        "parallel.pipeline_model_parallel_size=16", "train.global_batch_size=4096",
    )  # fmt: skip
    started = time.process_time()
    found = trace(one, rank)
    assert found.pipeline_rank == stage and found.stages == 16
    assert found.micro_batches == 4096 // (16384 // 64)
    assert time.process_time() - started < 60.0


def test_ranks_of_one_stage_hold_the_same() -> None:
    one = config("parallel.world_size=4", "parallel.pipeline_model_parallel_size=2")
    found = [sum(part.size for part in trace(one, rank).static if part.kind == "parameters") for rank in range(4)]
    assert found[0] == found[1] and found[2] == found[3]


def test_no_value_is_read_that_would_decide_a_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """What has no value is answered with one: only a flag and the gradient norm may ask."""
    answer: Callable[[torch.dtype], Any] = dry._scalar
    asked: list[torch.dtype] = []

    def noted(dtype: torch.dtype) -> Any:
        asked.append(dtype)
        return answer(dtype)

    monkeypatch.setattr(dry, "_scalar", noted)
    for overrides in ((), EXPERTS, ("parallel.context_parallel_size=2",), CASES["Router._within_capacity"]):
        trace(config(*overrides))
    assert set(asked) <= {torch.bool, torch.float32}


def test_nothing_fake_outlives_the_world() -> None:
    trace(config(*EXPERTS, "model.mtp_num_layers=1", "model.moe_aux_loss_coeff=0.01"))
    for scaler in (moe_utils.MoEAuxLossAutoScaler, multi_token_prediction.MTPLossAutoScaler):
        assert not isinstance(scaler.main_loss_backward_scale, FakeTensor)
