"""Stand-ins for Transformer Engine: parameters as core makes them, saved bytes by hand, peaks beside measured ones."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import pytest
import torch
from megatron.core.models.gpt import gpt_layer_specs
from megatron.core.transformer.moe import moe_utils
from torch import Tensor

from megatron_slm.config.load import load
from megatron_slm.memory.trace import Recorder
from megatron_slm.model.core_config import transformer_config
from megatron_slm.model.gpt import build_chunks
from megatron_slm.parallel import declared, device
from megatron_slm.parallel.declared_loss import use_loss
from megatron_slm.parallel.declared_ops import MIB, Kernels
from megatron_slm.parallel.dry import dry_world
from megatron_slm.parallel.gradients import unwrap, wrap
from megatron_slm.train.random_state import RandomState

TINY = ["preset=tiny", "model.vocab_size=1024", "model.num_layers=2", "precision.bf16=true", "parallel.world_size=4"]
LLAMA_405B = [
    *("preset=llama3-405b", "model.num_layers=4", "model.num_query_groups=16", "model.vocab_size=128256"),
    *("precision.bf16=true", "parallel.world_size=8", "parallel.tensor_model_parallel_size=8"),
    *("parallel.sequence_parallel=true", "model.seq_length=4096", "train.micro_batch_size=1"),
]
EXPERTS = [
    *("model.num_moe_experts=8", "model.moe_ffn_hidden_size=128", "parallel.expert_model_parallel_size=4"),
    *("parallel.moe_grouped_gemm=true", "model.moe_shared_expert_intermediate_size=64"),
]
LATENT = [
    *("model.multi_latent_attention=true", "model.qk_layernorm=true", "model.q_lora_rank=64", "model.kv_lora_rank=32"),
    *("model.qk_head_dim=32", "model.qk_pos_emb_head_dim=16", "model.v_head_dim=32", "model.num_query_groups=4"),
]


class Built(NamedTuple):
    """A rank in the dry world."""

    chunk: Any
    model: Any
    recorder: Recorder
    config: Any

    def alive_bytes(self) -> int:
        gc.collect()
        return sum(self.recorder.blocks[number].size for number in self.recorder.alive())

    def forward(self) -> Tensor:
        length, size = self.config.model.seq_length, self.config.train.micro_batch_size
        ids = torch.zeros(size, length // self.config.parallel.context_parallel_size, dtype=torch.int64)
        mask = torch.ones(ids.shape)
        out: Tensor = self.chunk(ids, ids, None, labels=ids, loss_mask=mask)
        return out

    def peak_of(self, events: list[int], start: int) -> int:
        now = peak = start
        for event in events:
            size = self.recorder.blocks[event if event >= 0 else ~event].size
            now += size if event >= 0 else -size
            peak = max(peak, now)
        return peak


@contextmanager
def dry(arguments: list[str], kernels: Kernels | None = None, **changes: Any) -> Iterator[Built]:
    device.preload("cpu")
    kernels = kernels or Kernels(loss="te")
    config = load(None, arguments).config
    world = config.parallel.world_size or 1
    with (
        declared.declared_kernels(kernels),
        dry_world(config.parallel, rank=0, world_size=world) as groups,
        Recorder() as recorder,
    ):
        RandomState(1, dp_rank=0, pp_rank=0)
        core = transformer_config(config.model, config.parallel, config.precision, config.train, device="cpu")
        published = kernels.loss != "ours"
        for name, value in (declared.declared_options(config.model, published=published) | changes).items():
            setattr(core, name, value)
        chunks = build_chunks(
            config.model,
            core,
            groups,
            vocab_size=config.model.vocab_size or 0,
            seed=1,
            spec=declared.declared_spec(config.model, False),
            device=torch.device("cpu"),
        )
        use_loss([unwrap(chunk) for chunk in chunks])
        (chunk,) = wrap(chunks, core, config.parallel, groups, reduce_in_fp32=True)
        yield Built(chunk, unwrap(chunk), recorder, config)


def marks(parameter: Tensor) -> dict[str, Any]:
    names = ("allreduce", "sequence_parallel", "tensor_model_parallel", "partition_dim")
    return {name: getattr(parameter, name, None) for name in names}


def test_parameters_have_core_s_names_shapes_and_marks() -> None:
    with dry([*TINY, "parallel.tensor_model_parallel_size=4", "parallel.sequence_parallel=true"]) as built:
        found = dict(built.model.decoder.layers[0].named_parameters())
        shapes = {name: tuple(parameter.shape) for name, parameter in found.items()}
        assert shapes == {
            "self_attention.linear_proj.weight": (256, 64),
            "self_attention.linear_qkv.layer_norm_weight": (256,),
            "self_attention.linear_qkv.weight": (128, 256),
            "mlp.linear_fc1.layer_norm_weight": (256,),
            "mlp.linear_fc1.weight": (352, 256),
            "mlp.linear_fc2.weight": (256, 176),
        }
        norm = marks(found["mlp.linear_fc1.layer_norm_weight"])
        assert norm["sequence_parallel"] is True
        assert not norm["tensor_model_parallel"]
        row = marks(found["mlp.linear_fc2.weight"])
        assert (row["tensor_model_parallel"], row["partition_dim"], row["allreduce"]) == (True, 1, True)
        assert dict(built.model.named_parameters())["decoder.final_layernorm.weight"].sequence_parallel is True


def test_latent_attention_has_core_s_parameters() -> None:
    with dry([*TINY, *LATENT]) as built:
        attention = built.model.decoder.layers[0].self_attention
        assert {name: tuple(parameter.shape) for name, parameter in attention.named_parameters()} == {
            "linear_proj.weight": (256, 256),
            "linear_q_down_proj.weight": (64, 256),
            "linear_q_up_proj.layer_norm_weight": (64,),
            "linear_q_up_proj.weight": (384, 64),
            "linear_kv_down_proj.weight": (48, 256),
            "linear_kv_up_proj.layer_norm_weight": (32,),
            "linear_kv_up_proj.weight": (512, 32),
        }
        built.forward().sum().backward()


@pytest.mark.parametrize("grouped", [True, False])
def test_experts_are_reduced_over_their_own_replicas(grouped: bool) -> None:
    arguments = [*TINY, *EXPERTS[:3], f"parallel.moe_grouped_gemm={str(grouped).lower()}", *EXPERTS[4:]]
    with dry(arguments, moe_permute_fusion=grouped) as built:
        experts = dict(built.model.decoder.layers[0].mlp.experts.named_parameters())
        first = "linear_fc1.weight0" if grouped else "local_experts.0.linear_fc1.weight"
        assert tuple(experts[first].shape) == (256, 256)
        assert len(experts) == 4
        assert not any(parameter.allreduce for parameter in experts.values())
        built.forward().sum().backward()
        assert all(parameter.grad_added_to_main_grad for parameter in experts.values())


def saved_by_one_layer(arguments: list[str], kernels: Kernels | None = None, **changes: Any) -> int:
    """Bytes that one more layer keeps for its backward pass."""
    kept = []
    for layers in (2, 3):
        with dry([*arguments, f"model.num_layers={layers}"], kernels, **changes) as built:
            built.forward().sum().backward()
            before = built.alive_bytes()
            out = built.forward()
            kept.append(built.alive_bytes() - before)
            del out
    return kept[1] - kept[0]


WITHOUT_LAYERS = [argument for argument in TINY if "num_layers" not in argument]


@pytest.mark.parametrize("tp", [1, 4])
def test_a_layer_keeps_what_the_modules_declare(tp: int) -> None:
    """Hidden 256, keys and values 2 x 128, MLP 704, 8 heads; S 256 and B 2, all divided over tp."""
    parallel = [f"parallel.tensor_model_parallel_size={tp}", f"parallel.sequence_parallel={str(tp > 1).lower()}"]
    tokens, random_state = 256 * 2 // tp, 16
    halves = 2 * tokens * (6 * 256 + 2 * 128 + 3 * 704)
    statistics = 4 * tokens * (8 + 2)  # of the softmax, by head, and of two norms
    kept = saved_by_one_layer([*WITHOUT_LAYERS, *parallel, "train.micro_batch_size=2"])
    assert kept == halves + statistics + random_state


def test_flash_attention_keeps_its_output_twice_where_there_are_several_samples() -> None:
    arguments = [*WITHOUT_LAYERS, "train.micro_batch_size=2"]
    flash = saved_by_one_layer(arguments, Kernels(loss="te", attention="flash"))
    assert flash - saved_by_one_layer(arguments) == 2 * 256 * 2 * 256


def test_unfused_attention_keeps_its_probabilities() -> None:
    arguments = [*WITHOUT_LAYERS, "train.micro_batch_size=1"]
    kept = saved_by_one_layer(arguments, Kernels(loss="te", attention="unfused"))
    repeated = 2 * 2 * 256 * 128  # keys and values for every query head instead of every second
    assert kept - saved_by_one_layer(arguments) == 2 * 8 * 256**2 + repeated - 4 * 256 * 8 - 16


def test_full_recomputation_keeps_a_layer_s_input() -> None:
    full = ["train.recompute_granularity=full", "train.recompute_method=uniform", "train.recompute_num_layers=1"]
    kept = saved_by_one_layer([*WITHOUT_LAYERS, *full, "train.micro_batch_size=1"])
    assert 0 <= kept - 2 * 256 * 256 < 32 * 1024  # states of generators beside it


@pytest.mark.parametrize("method", ["a2a", "p2p"])
def test_context_parallel_attention_runs(method: str) -> None:
    arguments = [*TINY, "parallel.context_parallel_size=2", "parallel.tensor_model_parallel_size=2"]
    with dry([*arguments, "parallel.sequence_parallel=true"], cp_comm_type=method) as built:
        built.forward().sum().backward()
        exchanges = {block.op for block in built.recorder.blocks if block.received}
        assert "aten.empty_like" in exchanges


def test_the_fused_loss_overwrites_its_logits() -> None:
    """No second tensor of their size, 1 x 256 x 1024 in bf16, while the loss is computed or its gradient is."""
    with dry(TINY) as built:
        out = built.forward()
        start = len(built.recorder.blocks)
        out.sum().backward()
        logits = 2 * 256 * 1024 * built.config.train.micro_batch_size
        assert not [
            block for block in built.recorder.blocks[start:] if block.size == logits and "output" in block.module
        ]


@pytest.mark.parametrize("loss", ["ours", "core", "core fused", "te"])
def test_every_loss_ends_a_model(loss: Any) -> None:
    with dry(TINY, Kernels(loss=loss)) as built:
        out = built.forward()
        assert tuple(out.shape) == (3,)
        out[0].backward()


def test_weight_gradients_are_added_without_a_tensor_of_their_own() -> None:
    with dry(TINY) as built:
        built.forward().sum().backward()
        weight = built.model.decoder.layers[0].mlp.linear_fc1.weight
        assert weight.grad_added_to_main_grad
        made = len(built.recorder.blocks)
        built.forward().sum().backward()
        size = weight.numel() * 2
        assert not [block for block in built.recorder.blocks[made:] if block.size == size and "fc1" in block.module]


def test_everything_is_as_before_afterwards() -> None:
    before = vars(moe_utils).copy(), vars(gpt_layer_specs).copy()
    with dry(TINY):
        assert moe_utils.HAVE_TE
    assert (vars(moe_utils), vars(gpt_layer_specs)) == before
    with pytest.raises(ModuleNotFoundError):
        __import__("transformer_engine")


def test_operations_are_counted() -> None:
    """Six for every weight and token, and causal attention; of the output layer the weight's gradient is declared."""
    with dry(TINY) as built:
        built.forward().sum().backward()
        ops = [op for op in built.recorder.phase.ops if op.name == "declared.kernel" and op.kind == "gemm"]
        tokens = 256 * built.config.train.micro_batch_size
        layer = 256 * (256 + 2 * 128) + 256 * 256 + 3 * 256 * 704
        attention = 2 * 256 * tokens * 8 * 32 * 2 // 2
        assert sum(op.flops for op in ops) == 2 * (6 * tokens * layer + attention * 7 // 2) + 2 * tokens * 256 * 1024


def test_peak_of_a_measured_rank() -> None:
    """Llama-3-405B, 4 of its layers, tp 8 on B200: 39,499.8 MiB (SimuMax v1.2, docs/b200).

    Optimizer state is counted by its formula: fp32 master and moments of every parameter.
    """
    with dry(LLAMA_405B, Kernels(loss="te", generation="blackwell")) as built:
        built.forward().sum().backward()
        built.recorder.phase.events.clear()
        start = built.alive_bytes()
        parameters = sum(parameter.numel() for parameter in built.model.parameters())
        built.forward().sum().backward()
        peak = built.peak_of(built.recorder.phase.events, start) + 12 * parameters
        assert peak / MIB == pytest.approx(39_499.8, rel=0.005)
