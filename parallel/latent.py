"""Multi-latent attention whose latents' gradients are whole under every layout (MLA, arXiv 2405.04434).

Core 0.16.1 sums the gradient of the shared rotary key over tp under sequence parallelism with Transformer Engine's
linears alone. Each tp rank uses that key for its own heads, so its gradient is a part: with core's column-parallel
linears, and with any linears without sequence parallelism, the parts of the other ranks are lost, the weight that makes
the key is trained by one rank's heads and no error is raised (Megatron-LM issue 7452).

Shapes: S sequence (local: S / tp under sequence parallelism), B batch, R rank of the key/value latent, P rotated
channels of a head.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    gather_from_tensor_model_parallel_region,
    scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.multi_latent_attention import MLASelfAttention, MLASelfAttentionSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from torch import Tensor, nn

from megatron_slm.model.config import ModelConfig
from megatron_slm.parallel.attention import SelfAttentionCore
from megatron_slm.parallel.norm import Norm

LATENT_NORM_KEYS = {
    "self_attention.q_layernorm.": "self_attention.linear_q_up_proj.layer_norm_",
    "self_attention.kv_layernorm.": "self_attention.linear_kv_up_proj.layer_norm_",
}
"""Our norms of the latents -> the names under which a Transformer Engine layer stores them."""


def latent_attention(model: ModelConfig) -> ModuleSpec:
    """Core's multi-latent attention of core's parallel linears; with ``qk_layernorm`` the latents are normalised."""
    norm = Norm if model.qk_layernorm else IdentityOp
    return ModuleSpec(
        module=LatentSelfAttention,
        params={"attn_mask_type": AttnMaskType.causal},
        submodules=MLASelfAttentionSubmodules(
            linear_q_proj=ColumnParallelLinear,
            linear_q_down_proj=ColumnParallelLinear,
            linear_q_up_proj=ColumnParallelLinear,
            linear_kv_down_proj=ColumnParallelLinear,
            linear_kv_up_proj=ColumnParallelLinear,
            core_attention=SelfAttentionCore,
            linear_proj=RowParallelLinear,
            q_layernorm=norm,
            kv_layernorm=norm,
        ),
    )


def with_whole_latents(layer: ModuleSpec) -> None:
    """Put ``LatentSelfAttention`` in the place of core's class in the spec of a transformer layer."""
    layer.submodules.self_attention.module = LatentSelfAttention


class LatentSelfAttention(MLASelfAttention):
    """Core's ``MLASelfAttention``; what follows its key/value down projection sees the whole latent."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.pg_collection.tp.size() > 1:
            self.linear_kv_down_proj.register_forward_hook(self._whole_latent)
            self._mark_copies()

    def _mark_copies(self) -> None:
        """Say which down projections every tp rank holds whole, so that the gradient norm counts them once.

        Transformer Engine's linears call themselves divided even then, and the norm of a DeepSeek-V3 comes out 1.4
        times too large at tp 8 (ROCm/TransformerEngine PR 715).
        """
        config = self.config
        whole = {"linear_kv_down_proj": config.kv_lora_rank + config.qk_pos_emb_head_dim}
        if config.q_lora_rank is not None:
            whole["linear_q_down_proj"] = config.q_lora_rank
        for name, rows in whole.items():
            weight = getattr(self, name).weight
            if weight.shape[0] == rows:
                weight.tensor_model_parallel = False

    def _whole_latent(
        self, module: nn.Module, inputs: Any, output: tuple[Tensor, Tensor | None]
    ) -> tuple[Tensor, Tensor | None]:
        """[S(/tp), B, R + P] of what the projection gives: that, or (R + P) / tp channels of the whole sequence.

        Core gathers the rotary key of a sequence-parallel result itself, and adds the parts of its gradient there.
        """
        combined, bias = output
        group, rank = self.pg_collection.tp, self.config.kv_lora_rank
        if combined.shape[-1] != rank + self.config.qk_pos_emb_head_dim:
            combined = gather_from_tensor_model_parallel_region(combined, group=group)
            if self.config.sequence_parallel:
                return scatter_to_sequence_parallel_region(combined, group=group), bias
        return (combined if self.config.sequence_parallel else _SharedKey.apply(combined, rank, group)), bias


class _SharedKey(torch.autograd.Function):
    """[S, B, R + P] as it is; backward adds the gradients of the last P channels over tp.

    Core's ``copy_to_tensor_model_parallel_region`` cannot: given a gradient that is not contiguous, as that of a slice,
    it reduces a copy and returns what it was given.
    """

    @staticmethod
    def forward(ctx: Any, combined: Tensor, rank: int, group: Any) -> Tensor:
        ctx.rank, ctx.group = rank, group
        return combined.view_as(combined)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Any:
        rotary = grad_output[..., ctx.rank :].contiguous()
        dist.all_reduce(rotary, group=ctx.group)
        return torch.cat([grad_output[..., : ctx.rank], rotary], dim=-1), None, None
