"""Parallelism bugs of one line each, planted into the real code of a rank's process.

What a function here changes stays changed as long as the process lives. ``tests/parallel_faults.py`` says under which
configuration each bug shows, and where.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def norm_gradients_not_summed() -> None:
    """Under sequence parallelism each tp rank keeps its own part of the norms' gradients."""
    finalize = importlib.import_module("megatron.core.distributed.finalize_model_grads")
    finalize._allreduce_non_tensor_model_parallel_grads = lambda *_: None


def tied_embedding_not_summed() -> None:
    """The first and the last pipeline stage update their copies of a tied embedding by their own gradients."""
    finalize = importlib.import_module("megatron.core.distributed.finalize_model_grads")
    finalize._allreduce_word_embedding_grads = lambda *_: None


def attention_output_not_reduced() -> None:
    """The row-parallel matrix behind attention returns this tp rank's part of the sum."""
    from megatron.core.tensor_parallel import layers

    _around_projection(layers, "reduce_from_tensor_model_parallel_region", lambda partial, **_: partial)


def attention_output_cut_instead_of_reduce_scattered() -> None:
    """Under sequence parallelism it returns its rows of its own part of the sum."""
    from megatron.core.tensor_parallel import layers, mappings

    _around_projection(
        layers,
        "reduce_scatter_to_sequence_parallel_region",
        lambda partial, group, **_: mappings.scatter_to_sequence_parallel_region(partial, group=group),
    )


def _around_projection(layers: Any, symbol: str, instead: Callable[..., Tensor]) -> None:
    """Give ``layers.symbol`` another meaning inside the forward pass of every ``linear_proj``."""
    forward, original = layers.RowParallelLinear.forward, getattr(layers, symbol)

    def planted(self: Any, hidden: Tensor) -> Any:
        is_projection = self.input_size == self.config.kv_channels * self.config.num_attention_heads
        setattr(layers, symbol, instead if is_projection else original)
        try:
            return forward(self, hidden)
        finally:
            setattr(layers, symbol, original)

    layers.RowParallelLinear.forward = planted


def input_gradient_not_reduced() -> None:
    """The first matrix of the MLP hands back this tp rank's part of the gradient of its input."""
    from megatron.core.transformer import mlp

    build = mlp.build_module

    def planted(spec: Any, *rest: Any, **options: Any) -> Any:
        module = build(spec, *rest, **options)
        if options.get("tp_comm_buffer_name") == "fc1":
            multiply = module._forward_impl
            module._forward_impl = lambda *_, **given: multiply(**{**given, "allreduce_dgrad": False})
        return module

    mlp.build_module = planted


def gate_and_up_swapped() -> None:
    """The gate and up halves of the MLP's first matrix lie the wrong way round on the second tp rank."""

    def swap(chunk: Any, groups_tp: Any) -> None:
        for layer in chunk.decoder.layers:
            weight = layer.mlp.linear_fc1.weight
            if groups_tp.rank() == 1:
                weight.data.copy_(torch.cat(weight.data.chunk(2)[::-1]))

    _after_initialisation(swap)


def shards_of_two_ranks_swapped() -> None:
    """Two tp ranks hold each other's part of the query/key/value matrix."""

    def swap(chunk: Any, tp: Any) -> None:
        for layer in chunk.decoder.layers:
            weight = layer.self_attention.linear_qkv.weight
            everyone = [torch.empty_like(weight) for _ in range(tp.size())]
            dist.all_gather(everyone, weight.data, group=tp)
            weight.data.copy_(everyone[tp.rank() - 1])

    _after_initialisation(swap)


def _after_initialisation(change: Callable[[Any, Any], None]) -> None:
    """Change every chunk, given the tp group, once its weights are there."""
    from megatron_slm.model import gpt

    initialise = gpt.initialise

    def planted(chunks: list[Any], *rest: Any, **options: Any) -> None:
        initialise(chunks, *rest, **options)
        with torch.no_grad():
            for chunk in chunks:
                change(chunk, chunk.pg_collection.tp)

    gpt.initialise = planted


def bucket_not_reduced() -> None:
    """The bucket of the output layer, the first to be ready, keeps each replica's own gradient."""
    from megatron.core.distributed.param_and_grad_buffer import _ParamAndGradBucketGroup

    start = _ParamAndGradBucketGroup.start_grad_sync

    class Done:
        def wait(self) -> None:
            """Nothing is under way."""

    def planted(self: Any, force_all_reduce: bool = False) -> None:
        if self.buckets[0].bucket_id == 0 and holds_output(self):
            self.grad_reduce_handle = Done()
        else:
            start(self, force_all_reduce)

    def holds_output(group: Any) -> bool:
        return any(param.shape[0] > 2 * param.shape[-1] for param in group.params if param.dim() == 2)

    _ParamAndGradBucketGroup.start_grad_sync = planted


def vocabulary_offset_off_by_one() -> None:
    """From the second tp rank on the labels are one row off in its part of the vocabulary."""
    from megatron_slm.parallel import vocab_loss

    losses = vocab_loss._losses

    def planted(logits: Tensor, targets: Tensor, group: Any, *rest: Any, **options: Any) -> Any:
        return losses(logits, targets - min(group.rank(), 1), group, *rest, **options)

    vocab_loss._losses = planted


def wrong_micro_batch() -> None:
    """The last pipeline stage takes the labels of the micro-batch after the one whose hidden states it receives."""
    from megatron_slm.parallel.groups import is_last_pipeline_rank
    from megatron_slm.train import step

    run_schedule = step.run_schedule

    def planted(chunks: list[Any], batches: list[Any], *rest: Any, groups: Any, **options: Any) -> Any:
        if groups.pp.size() > 1 and is_last_pipeline_rank(groups):
            batches = [*batches[1:], batches[0]]
        return run_schedule(chunks, batches, *rest, groups=groups, **options)

    step.run_schedule = planted


def virtual_stages_swapped() -> None:
    """The last pipeline rank runs its virtual stages' layers in the opposite order."""
    from megatron.core.transformer import transformer_block, transformer_layer

    from megatron_slm.model import gpt

    offset = transformer_layer.get_transformer_layer_offset

    def planted(config: Any, vp_stage: int | None = None, pp_rank: int | None = None) -> int:
        if vp_stage is not None and pp_rank == config.pipeline_model_parallel_size - 1:
            vp_stage = config.virtual_pipeline_model_parallel_size - 1 - vp_stage
        return int(offset(config, vp_stage, pp_rank))

    gpt.get_transformer_layer_offset = planted
    transformer_block.get_transformer_layer_offset = planted
    transformer_layer.get_transformer_layer_offset = planted


def replicated_parameters_counted_twice() -> None:
    """The gradient norm counts what every tp rank holds once for each of them."""
    from megatron.core import tensor_parallel

    tensor_parallel.param_is_not_tensor_parallel_duplicate = lambda *_, **__: True


def shifted_optimizer_shard() -> None:
    """The second data-parallel rank updates its shards by gradients that lie one element further."""
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    step = DistributedOptimizer.step_with_ready_grads

    def planted(self: Any) -> Any:
        if self.data_parallel_group.rank() == 1:
            for group in self.optimizer.param_groups:
                for param in group["params"]:
                    param.grad = param.grad.roll(1)
        return step(self)

    DistributedOptimizer.step_with_ready_grads = planted


def parameters_not_gathered() -> None:
    """After the update nobody tells the other replicas."""
    from megatron.core.distributed import DistributedDataParallel

    DistributedDataParallel.start_param_sync = lambda self, *_, **__: None


def norm_differs_in_recomputation() -> None:
    """The recomputed forward pass scales where it should normalise."""
    from megatron.core.tensor_parallel.random import CheckpointFunction

    from megatron_slm.parallel.norm import Norm

    backward, forward = CheckpointFunction.backward, Norm.forward
    recomputing = []

    def planted_backward(ctx: Any, *gradients: Any) -> Any:
        recomputing.append(True)
        try:
            return backward(ctx, *gradients)
        finally:
            recomputing.pop()

    CheckpointFunction.backward = staticmethod(planted_backward)
    Norm.forward = lambda self, x: x * self.weight if recomputing else forward(self, x)


def tokens_counted_once_a_context_rank() -> None:
    """The number of loss tokens that gradients are divided by counts each cp rank's share cp times."""
    from megatron_slm.parallel import gradients

    finalize = gradients.finalize_model_grads

    @functools.wraps(finalize)
    def planted(model: Any, num_tokens: Any = None, pg_collection: Any = None, **options: Any) -> Any:
        if num_tokens is not None:
            num_tokens *= pg_collection.cp.size()
        return finalize(model, num_tokens, pg_collection=pg_collection, **options)

    gradients.finalize_model_grads = planted


def rotary_positions_of_contiguous_cut() -> None:
    """Each cp rank rotates by the positions of a contiguous cut, while it holds the first and the last chunk."""
    from megatron.core.models.common.embeddings import rope_utils, rotary_pos_embedding

    def planted(pos_emb: Tensor, seq_dim: int, cp_group: Any) -> Tensor:
        return pos_emb.chunk(cp_group.size(), seq_dim)[cp_group.rank()]

    rope_utils.get_pos_emb_on_this_cp_rank = planted
    rotary_pos_embedding.get_pos_emb_on_this_cp_rank = planted


def ring_skips_a_block() -> None:
    """Queries do not see the keys of the cp rank before theirs."""
    from megatron_slm.parallel import ring

    visible_blocks = ring.visible_blocks

    def planted(documents: Any, length: int, cp_rank: int, cp_size: int) -> Any:
        blocks = visible_blocks(documents, length, cp_rank, cp_size)
        blocks[cp_rank - 1] = []
        return blocks

    ring.visible_blocks = planted


def key_gradients_of_other_ranks_dropped() -> None:
    """Keys and values get their gradient from the queries of their own rank alone."""
    from megatron_slm.parallel import ring

    visit = ring.Ring.visit_and_return

    def planted(self: Any, kv: Tensor, take: Any) -> Tensor:
        return visit(self, kv, lambda owner, values: take(owner, values) * (owner == self.rank))

    ring.Ring.visit_and_return = planted


def _without_cutting(name: str, instead: Callable[[Tensor, int, int], Tensor]) -> None:
    """Cut one tensor of the batch in another way than the rest."""
    from megatron_slm.parallel import context

    cut_batch = context.cut_batch

    def planted(batch: dict[str, Tensor], cp_rank: int, cp_size: int) -> dict[str, Tensor]:
        part = dict(cut_batch(batch, cp_rank, cp_size))
        if cp_size > 1:
            part[name] = instead(batch[name], cp_rank, cp_size).contiguous()
        return part

    context.cut_batch = planted


def positions_not_cut() -> None:
    """Every cp rank numbers its tokens from 0."""
    _without_cutting("position_ids", lambda whole, rank, size: whole.chunk(size, 1)[0])


def labels_cut_contiguously() -> None:
    """The labels are cut into as many parts as there are cp ranks, the tokens into twice as many."""
    _without_cutting("labels", lambda whole, rank, size: whole.chunk(size, 1)[rank])


def loads_not_summed_over_context() -> None:
    """The balancing loss counts the tokens of each expert on this cp rank alone."""
    _regroup_routers("tp_cp_group", "tp_group")


def loads_not_summed_over_replicas() -> None:
    """The bias that balances experts follows the load of this replica alone."""
    _regroup_routers("tp_dp_cp_group", "tp_cp_group")


def _regroup_routers(name: str, instead: str) -> None:
    """Give every router one of its groups under the name of another."""
    from megatron_slm.parallel.router import Router

    build = Router.__init__

    def planted(self: Any, *rest: Any, **options: Any) -> None:
        build(self, *rest, **options)
        setattr(self, name, getattr(self, instead))

    Router.__init__ = planted


def capacity_of_each_rank() -> None:
    """Each cp rank decides from its own tokens which of them an expert drops."""
    from megatron_slm.parallel.router import Router

    Router._of_all_ranks = lambda self, local: local
    Router._of_this_rank = lambda self, whole: whole


def dropped_experts() -> None:
    """What the experts of the second ep rank compute is lost."""
    from megatron.core.transformer.moe.experts import SequentialMLP

    forward = SequentialMLP.forward

    def planted(self: Any, *tokens: Any) -> Any:
        output, bias = forward(self, *tokens)
        return (output * (self.ep_group.rank() != 1), bias)

    SequentialMLP.forward = planted


def expert_gradients_reduced_as_dense_ones() -> None:
    """The gradients of experts are summed over the replicas of the dense layers, whose ranks hold other experts."""
    from megatron_slm.model import gpt

    def planted(chunk: Any, groups: Any) -> None:
        for name, param in chunk.named_parameters():
            if ".experts." in name:
                param.allreduce, param.tensor_model_parallel = True, True

    gpt.mark_expert_weights = planted


def predicted_labels_rolled_within_a_rank() -> None:
    """The labels of multi-token prediction move on within each cp rank's tokens, as if they were one run of text."""
    from megatron_slm.model import prediction

    roll = prediction.roll_tensor
    prediction.roll_tensor = lambda tensor, cp_group: roll(tensor, cp_group=None)


def predicted_labels_not_rolled() -> None:
    """Behind a pipeline multi-token prediction is asked for the token that the main model predicts already."""
    from megatron.core import parallel_state

    from megatron_slm.model import prediction

    roll = prediction.roll_tensor

    def planted(tensor: Tensor, cp_group: Any) -> tuple[Tensor, Tensor]:
        if parallel_state.get_pipeline_model_parallel_world_size() > 1:
            return tensor, tensor.sum()
        rolled: tuple[Tensor, Tensor] = roll(tensor, cp_group=cp_group)
        return rolled

    prediction.roll_tensor = planted
