"""One rank's model chunks: core's GPTModel with our loss at its end and layout-invariant weights."""

from __future__ import annotations

import math
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.transformer_block import get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset
from megatron.core.transformer.utils import ensure_metadata_has_dp_cp_group
from torch import Tensor, nn

from megatron_slm.model.config import ModelConfig
from megatron_slm.model.prediction import deeper_targets, with_predictions
from megatron_slm.parallel.experts import mark_expert_weights
from megatron_slm.parallel.initialise import initialise
from megatron_slm.parallel.predict import prediction_submodules
from megatron_slm.parallel.specs import block_submodules, layer_specs
from megatron_slm.parallel.vocab_loss import Objective, vocab_parallel_loss

RESIDUAL_OUTPUTS = ("self_attention.linear_proj.weight", ".linear_fc2.weight")
HIDDEN_MATRICES = (
    *RESIDUAL_OUTPUTS,
    "self_attention.linear_qkv.weight",
    "self_attention.linear_q_proj.weight",
    "self_attention.linear_q_down_proj.weight",
    "self_attention.linear_q_up_proj.weight",
    "self_attention.linear_kv_down_proj.weight",
    "self_attention.linear_kv_up_proj.weight",
    ".linear_fc1.weight",  # of an MLP, an expert or the shared expert
    ".eh_proj.weight",  # of multi-token prediction: hidden state and next embedding -> input of its layer
)
ROUTING = (".router.weight", ".shared_experts.gate_weight")
INPUT_AND_OUTPUT = ("word_embeddings.weight", "position_embeddings.weight", "output_layer.weight")


class OutputLayer(ColumnParallelLinear):
    """Core's output matrix that ends in the loss when it is given labels.

    The loss must run inside this module's ``forward``: core waits for an overlapped parameter gather in its pre-hook.
    """

    def forward(
        self,
        hidden: Tensor,
        weight: Tensor | None = None,
        runtime_gather_output: bool | None = None,
        *,
        labels: Tensor | None = None,
        loss_mask: Tensor | None = None,
        objective: Objective | None = None,
    ) -> Any:
        """hidden [S(/tp), B, H] -> (logits [S, B, V/tp], bias); with labels and loss_mask [B, S] the loss [3]."""
        if labels is None or loss_mask is None or objective is None:
            return super().forward(hidden, weight, runtime_gather_output)
        if self.sequence_parallel:
            hidden = gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=True, group=self.tp_group)
        else:
            hidden = copy_to_tensor_model_parallel_region(hidden, group=self.tp_group)
        return vocab_parallel_loss(
            hidden.reshape(-1, hidden.shape[-1]),
            self.weight if weight is None else weight,
            labels.t().reshape(-1),
            loss_mask.t().reshape(-1),
            group=self.tp_group,
            objective=objective,
        )


class GPT(GPTModel):
    """``GPTModel`` that returns the masked sums of the loss instead of logits when it is given labels.

    Called with tokens, position_ids [B, S], document ids [B, S] or None, labels and loss_mask [B, S]; returns hidden
    states [S(/tp), B, H] on a chunk that does not end the model, else the sums [3] of ``vocab_parallel_loss``, in
    training those of ``with_predictions`` where there is multi-token prediction; without labels, logits [B, S, V/tp].

    Args:
        objective: of the loss.
    """

    def __init__(self, *, objective: Objective, output_multiplier: float, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.objective = objective
        self.output_multiplier = output_multiplier
        if self.post_process:
            # Core names the class itself; the weights, their marks and their tie to the embedding stay as it made them.
            self.output_layer.__class__ = OutputLayer
            if self.mtp_process and self.share_embeddings_and_output_weights:
                # The embedding is on this stage, and core would store a second, unused output matrix beside it.
                self.output_layer.weight = None

    def _postprocess(self, hidden_states: Tensor, **rest: Any) -> Tensor:
        if not self.post_process:
            return hidden_states
        if rest["labels"] is None:
            logits: Tensor = self._ended(hidden_states)[0]
            return logits.transpose(0, 1).contiguous()
        labels, loss_mask = rest["labels"], rest["loss_mask"]
        sums: Tensor = self._ended(hidden_states, labels=labels, loss_mask=loss_mask, objective=self.objective)
        if not (self.mtp_process and self.training):
            return sums
        passed = ("input_ids", "position_ids", "attention_mask", "rotary_pos_emb")
        joined = self.mtp(
            hidden_states=hidden_states, embedding=self.embedding, **{name: rest[name] for name in passed}
        )
        depths: int = self.config.mtp_num_layers
        targets = deeper_targets(labels, loss_mask, rest["attention_mask"], depths=depths, group=self.pg_collection.cp)
        deeper = [
            (self._ended(hidden, labels=own, loss_mask=mask, objective=self.objective), mask.sum())
            for hidden, (own, mask) in zip(joined.chunk(1 + depths)[1:], targets, strict=True)
        ]
        return with_predictions(sums, deeper, self.config.mtp_loss_scaling_factor / depths)

    def _ended(self, hidden_states: Tensor, **target: Any) -> Any:
        """What the output layer makes of hidden states [S(/tp), B, H]: logits, or sums where there is a target."""
        if self.output_multiplier != 1.0:
            hidden_states = hidden_states * self.output_multiplier
        tied = self.share_embeddings_and_output_weights
        weight = self.shared_embedding_or_output_weight() if tied else None
        return self.output_layer(hidden_states, weight=weight, **target)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Core's, which forgets to complete the metadata that it reads for the embedding of multi-token prediction."""
        state: dict[str, Any] = super().sharded_state_dict(
            prefix, sharded_offsets, ensure_metadata_has_dp_cp_group(metadata)
        )
        return state


def build_chunks(
    model: ModelConfig,
    config: TransformerConfig,
    groups: Any,
    *,
    vocab_size: int,
    seed: int,
    spec: tuple[Any, Any],
    device: torch.device,
    z_loss_coefficient: float = 0.0,
    label_smoothing: float = 0.0,
) -> list[nn.Module]:
    """Model chunks of this rank (one, or vpp of them), initialised, in the precision of ``config``.

    Args:
        vocab_size: tokens of the tokenizer; the embedding has ``model.padded_vocab_size(vocab_size)`` rows.
        spec: layer spec and norm class of ``parallel.specs.choose_spec``.
        z_loss_coefficient, label_smoothing: of the objective; see ``parallel.vocab_loss``.
    """
    objective = Objective(vocab_size, z_loss_coefficient, label_smoothing)
    vpp = config.virtual_pipeline_model_parallel_size or 1
    rank, stages = groups.pp.rank(), groups.pp.size()
    chunks: list[nn.Module] = []
    for index in range(vpp):
        vp_stage = index if vpp > 1 else None
        first = get_transformer_layer_offset(config, vp_stage=vp_stage, pp_rank=rank)
        layers = range(first, first + get_num_layers_to_build(config, vp_stage=vp_stage, pp_rank=rank))
        specs = layer_specs(*spec, model, layers, grouped_gemm=config.moe_grouped_gemm)
        ends = rank == stages - 1 and index == vpp - 1
        chunks.append(
            GPT(
                objective=objective,
                output_multiplier=1.0 / model.width_multiplier,
                config=config,
                transformer_layer_spec=block_submodules(specs, spec[1]),
                vocab_size=model.padded_vocab_size(vocab_size),
                max_sequence_length=model.position_limit,
                pre_process=rank == 0 and index == 0,
                post_process=ends,
                mtp_block_spec=prediction_specs(model, config, spec) if ends else None,
                share_embeddings_and_output_weights=not model.untie_embeddings_and_output_weights,
                position_embedding_type=model.position_embedding_type,
                rotary_percent=model.rotary_percent,
                rotary_base=model.rotary_base,
                rope_scaling=model.use_rope_scaling,
                rope_scaling_factor=model.rope_scaling_factor,
                pg_collection=groups,
                vp_stage=vp_stage,
            )
        )
    for chunk in chunks:
        # Position embeddings and norms are made by torch's own modules: default precision, on the host.
        chunk.to(dtype=config.params_dtype, device=device)
        mark_expert_weights(chunk, groups)
    initialise(chunks, seed, lambda name: initial_deviation(name, model))
    return [Float16Module(config, chunk) if config.bf16 else chunk for chunk in chunks]


def prediction_specs(model: ModelConfig, config: TransformerConfig, spec: tuple[Any, Any]) -> Any:
    """The layers of multi-token prediction, which core puts behind the last one; None where there are none."""
    if model.mtp_num_layers is None:
        return None
    last = range(model.num_layers - 1, model.num_layers)
    (layer,) = layer_specs(*spec, model, last, grouped_gemm=config.moe_grouped_gemm)
    return prediction_submodules(layer, spec[1], model.mtp_num_layers)


def initial_deviation(name: str, model: ModelConfig) -> float | None:
    """Standard deviation of a parameter by its global name; None where the module's own constant stays.

    Megatron's rule: ``init_method_std`` everywhere, divided by sqrt(2 x layers) where a matrix writes into the residual
    stream. muP (arXiv 2203.03466, table 8) divides hidden matrices by sqrt(m), m the width over the base width. A
    router maps the width to a fixed number of experts: it is no hidden matrix, and stays as it is.
    """
    if is_hidden_matrix(name):
        deviation = model.init_method_std / math.sqrt(model.width_multiplier)
        writes = _without_expert(name).endswith(RESIDUAL_OUTPUTS)
        return deviation / math.sqrt(2.0 * model.num_layers) if writes else deviation
    return model.init_method_std if name.endswith(INPUT_AND_OUTPUT + ROUTING) else None


def is_hidden_matrix(name: str) -> bool:
    """Whether a parameter maps the width to a width that grows with it; experts' matrices among them."""
    return _without_expert(name).endswith(HIDDEN_MATRICES)


def _without_expert(name: str) -> str:
    """Transformer Engine numbers the experts of a grouped matrix behind its name: ``linear_fc1.weight12``."""
    return name.rstrip("0123456789")
