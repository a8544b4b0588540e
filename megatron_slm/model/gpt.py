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

from megatron_slm.model.config import ADAPTER_SUFFIX, LoraConfig, ModelConfig
from megatron_slm.model.counts import adapter_sizes
from megatron_slm.model.ending import Ending, Fields, Scalar, ScalarHead, TokenSums
from megatron_slm.model.prediction import deeper_targets, with_predictions
from megatron_slm.parallel.experts import mark_expert_weights
from megatron_slm.parallel.initialise import initialise
from megatron_slm.parallel.lora import add_adapters, initial_adapter_deviation
from megatron_slm.parallel.predict import prediction_submodules
from megatron_slm.parallel.specs import block_submodules, layer_specs
from megatron_slm.parallel.vocab_loss import Objective

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
    """Core's output matrix that goes on to the model's ending when it is given one.

    The ending must run inside this module's ``forward``: core waits for an overlapped parameter gather in its pre-hook.
    """

    def forward(
        self,
        hidden: Tensor,
        weight: Tensor | None = None,
        runtime_gather_output: bool | None = None,
        *,
        ending: Ending | None = None,
        fields: Fields | None = None,
    ) -> Any:
        """hidden [S(/tp), B, H] -> (logits [S, B, V/tp], bias); with an ending what it makes of the batch's fields."""
        if ending is None or fields is None:
            return super().forward(hidden, weight, runtime_gather_output)
        if self.sequence_parallel:
            hidden = gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=True, group=self.tp_group)
        else:
            hidden = copy_to_tensor_model_parallel_region(hidden, group=self.tp_group)
        matrix = self.weight if weight is None else weight
        return ending(hidden.reshape(-1, hidden.shape[-1]), matrix, fields, self.tp_group)


class GPT(GPTModel):
    """``GPTModel`` that ends as its stage wants it when it is given labels.

    Called with tokens, position_ids [B, S], document ids [B, S] or None, labels and loss_mask [B, S], and ``fields``
    where the ending reads more of the batch; returns hidden states [S(/tp), B, H] on a chunk that does not end the
    model, else what its ending makes of them: in training with multi-token prediction the sums of
    ``with_predictions``; without labels, logits [B, S, V/tp].

    Args:
        ending: what is made of the last hidden states. With ``Scalar`` there is no output matrix but ``value_head``.
    """

    output_layer: Any
    post_process: bool

    def __init__(self, *, ending: Ending | Scalar, output_multiplier: float, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.ending = ending
        self.output_multiplier = output_multiplier
        self._fields: Fields = {}
        if isinstance(ending, Scalar):
            self.output_layer = None
            if self.post_process:
                self.value_head = ScalarHead(
                    self.config.hidden_size,
                    sequence_parallel=self.config.sequence_parallel,
                    group=self.pg_collection.tp,
                )
        elif self.post_process:
            # Core names the class itself; the weights, their marks and their tie to the embedding stay as it made them.
            self.output_layer.__class__ = OutputLayer
            if self.mtp_process and self.share_embeddings_and_output_weights:
                # The embedding is on this stage, and core would store a second, unused output matrix beside it.
                self.output_layer.weight = None

    def forward(self, *args: Any, fields: Fields | None = None, **kwargs: Any) -> Tensor:
        """See the class; ``fields``: of the batch, for the ending."""
        self._fields = fields or {}
        output: Tensor = super().forward(*args, **kwargs)
        self._fields = {}
        return output

    def _postprocess(self, hidden_states: Tensor, **rest: Any) -> Tensor:
        if not self.post_process:
            return hidden_states
        if isinstance(self.ending, Scalar):
            numbers: Tensor = self.value_head(hidden_states)
            return numbers
        if rest["labels"] is None:
            logits: Tensor = self._ended(hidden_states)[0]
            return logits.transpose(0, 1).contiguous()
        labels, loss_mask = rest["labels"], rest["loss_mask"]
        fields = {**self._fields, "labels": labels, "loss_mask": loss_mask}
        sums: Tensor = self._ended(hidden_states, ending=self.ending, fields=fields)
        if not (self.mtp_process and self.training):
            return sums
        passed = ("input_ids", "position_ids", "attention_mask", "rotary_pos_emb")
        joined = self.mtp(
            hidden_states=hidden_states, embedding=self.embedding, **{name: rest[name] for name in passed}
        )
        depths: int = self.config.mtp_num_layers
        targets = deeper_targets(labels, loss_mask, rest["attention_mask"], depths=depths, group=self.pg_collection.cp)
        deeper = [
            (self._ended(hidden, ending=self.ending, fields={"labels": own, "loss_mask": mask}), mask.sum())
            for hidden, (own, mask) in zip(joined.chunk(1 + depths)[1:], targets, strict=True)
        ]
        return with_predictions(sums, deeper, self.config.mtp_loss_scaling_factor / depths)

    def _ended(self, hidden_states: Tensor, **ending: Any) -> Any:
        """What the output layer makes of hidden states [S(/tp), B, H]: logits, or more where there is an ending."""
        if self.output_multiplier != 1.0:
            hidden_states = hidden_states * self.output_multiplier
        tied = self.share_embeddings_and_output_weights
        weight = self.shared_embedding_or_output_weight() if tied else None
        return self.output_layer(hidden_states, weight=weight, **ending)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Core's, which forgets to complete the metadata that it reads for the embedding of multi-token prediction.

        It also takes every last stage to have an output matrix.
        """
        ends = self.post_process
        self.post_process = ends and self.output_layer is not None
        state: dict[str, Any] = super().sharded_state_dict(
            prefix, sharded_offsets, ensure_metadata_has_dp_cp_group(metadata)
        )
        self.post_process = ends
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
    ending: Ending | Scalar | None = None,
    lora: LoraConfig | None = None,
) -> list[nn.Module]:
    """Model chunks of this rank (one, or vpp of them), initialised, in the precision of ``config``.

    Args:
        vocab_size: tokens of the tokenizer; the embedding has ``model.padded_vocab_size(vocab_size)`` rows.
        spec: layer spec and norm class of ``parallel.specs.choose_spec``.
        ending: of the model; by default the sums of the cross-entropy.
        lora: adapters, where its rank is not 0; everything else is frozen then, but for a head that gives a number.
    """
    ending = ending or TokenSums(Objective(vocab_size))
    scalar = isinstance(ending, Scalar)
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
                ending=ending,
                output_multiplier=1.0 / model.width_multiplier,
                config=config,
                transformer_layer_spec=block_submodules(specs, spec[1]),
                vocab_size=model.padded_vocab_size(vocab_size),
                max_sequence_length=model.position_limit,
                pre_process=rank == 0 and index == 0,
                post_process=ends,
                mtp_block_spec=prediction_specs(model, config, spec) if ends else None,
                share_embeddings_and_output_weights=not (model.untie_embeddings_and_output_weights or scalar),
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
        if lora is not None and lora.lora_rank:
            add_adapters(chunk, lora, config, groups)
    initialise(chunks, seed, lambda name: ending_deviation(name, ending) or initial_deviation(name, model))
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
    if ADAPTER_SUFFIX in name:
        return initial_adapter_deviation(name, {target: size[0] for target, size in adapter_sizes(model).items()})
    if is_hidden_matrix(name):
        deviation = model.init_method_std / math.sqrt(model.width_multiplier)
        writes = _without_expert(name).endswith(RESIDUAL_OUTPUTS)
        return deviation / math.sqrt(2.0 * model.num_layers) if writes else deviation
    return model.init_method_std if name.endswith(INPUT_AND_OUTPUT + ROUTING) else None


def ending_deviation(name: str, ending: Ending | Scalar) -> float | None:
    """Standard deviation of the head's weights; None for every other name, and where the head begins with zeros."""
    if isinstance(ending, Scalar) and name.endswith("value_head.weight"):
        return ending.initial_deviation or None
    return None


def is_hidden_matrix(name: str) -> bool:
    """Whether a parameter maps the width to a width that grows with it; experts' matrices among them."""
    return _without_expert(name).endswith(HIDDEN_MATRICES)


def _without_expert(name: str) -> str:
    """Transformer Engine numbers the experts of a grouped matrix behind its name: ``linear_fc1.weight12``."""
    return name.rstrip("0123456789")
