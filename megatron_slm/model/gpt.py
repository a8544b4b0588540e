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
from torch import Tensor, nn

from megatron_slm.model.config import ModelConfig
from megatron_slm.parallel.initialise import initialise
from megatron_slm.parallel.specs import block_submodules
from megatron_slm.parallel.vocab_loss import Objective, vocab_parallel_loss

RESIDUAL_OUTPUTS = ("self_attention.linear_proj.weight", "mlp.linear_fc2.weight")
HIDDEN_MATRICES = (*RESIDUAL_OUTPUTS, "self_attention.linear_qkv.weight", "mlp.linear_fc1.weight")
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
    states [S(/tp), B, H] on a chunk that does not end the model, else the sums [3] of ``vocab_parallel_loss``; without
    labels, core's logits [B, S, V/tp].

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

    def _postprocess(self, hidden_states: Tensor, **rest: Any) -> Tensor:
        if not self.post_process:
            return hidden_states
        if self.output_multiplier != 1.0:
            hidden_states = hidden_states * self.output_multiplier
        if rest["labels"] is None:
            logits: Tensor = super()._postprocess(hidden_states, **rest)
            return logits
        tied = self.share_embeddings_and_output_weights
        loss: Tensor = self.output_layer(
            hidden_states,
            weight=self.shared_embedding_or_output_weight() if tied else None,
            labels=rest["labels"],
            loss_mask=rest["loss_mask"],
            objective=self.objective,
        )
        return loss


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
        layers = get_num_layers_to_build(config, vp_stage=vp_stage, pp_rank=rank)
        chunks.append(
            GPT(
                objective=objective,
                output_multiplier=1.0 / model.width_multiplier,
                config=config,
                transformer_layer_spec=block_submodules(spec[0], spec[1], layers),
                vocab_size=model.padded_vocab_size(vocab_size),
                max_sequence_length=model.position_limit,
                pre_process=rank == 0 and index == 0,
                post_process=rank == stages - 1 and index == vpp - 1,
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
    initialise(chunks, seed, lambda name: initial_deviation(name, model))
    return [Float16Module(config, chunk) if config.bf16 else chunk for chunk in chunks]


def initial_deviation(name: str, model: ModelConfig) -> float | None:
    """Standard deviation of a parameter by its global name; None where the module's own constant stays.

    Megatron's rule: ``init_method_std`` everywhere, divided by sqrt(2 x layers) where a matrix writes into the residual
    stream. muP (arXiv 2203.03466, table 8) divides hidden matrices by sqrt(m), m the width over the base width.
    """
    if name.endswith(HIDDEN_MATRICES):
        deviation = model.init_method_std / math.sqrt(model.width_multiplier)
        return deviation / math.sqrt(2.0 * model.num_layers) if name.endswith(RESIDUAL_OUTPUTS) else deviation
    return model.init_method_std if name.endswith(INPUT_AND_OUTPUT) else None
