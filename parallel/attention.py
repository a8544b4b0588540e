"""Core attention through torch's scaled_dot_product_attention: causal, grouped queries, packed documents.

Never holds an S x S score matrix; over several cp ranks it is that of ``parallel/ring.py``. Shapes: S sequence, B
batch, N query heads of this tp rank, G key/value heads of this tp rank, D width of queries and keys, E width of values
(equal to D but for multi-latent attention).
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from megatron_slm.parallel.block_attention import of_one_width
from megatron_slm.parallel.kv_cache import KeyValueCache
from megatron_slm.parallel.ring import Exchange, attend, exchange

QUERY_BLOCK = 128  # rows of one block where no fused kernel exists; 128 x S probabilities live at a time


class SelfAttentionCore(nn.Module):
    """Drop-in for core's ``DotProductAttention`` (same constructor and call).

    ``attention_mask`` carries the packed documents instead of a mask: int64 [B, S] on the *host*, one number per
    token of the whole sequence, equal inside a document, documents contiguous; None is one document per sample. It
    stays on the host because the segment boundaries decide which kernels are launched.
    """

    def __init__(
        self,
        config: Any,
        layer_number: int,
        attn_mask_type: Any,
        attention_type: str,
        *,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        k_channels: int | None = None,
        v_channels: int | None = None,
        cp_comm_type: str | None = None,
        pg_collection: Any = None,
    ) -> None:
        super().__init__()
        self.cache: KeyValueCache | None = None
        """There while text is generated (``parallel/incremental.py``): q, k and v are then of new tokens alone."""
        self.over: Exchange | None = None
        if config.context_parallel_size > 1:
            self.over = exchange(pg_collection.cp, cp_comm_type or "p2p")
        self.dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        assert self.over is None or self.dropout == 0.0, "with context parallelism attention has no dropout"
        self.scale = softmax_scale or 1.0 / math.sqrt(k_channels or config.kv_channels)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        *,
        attn_mask_type: Any = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: Any = None,
    ) -> Tensor:
        """query and key [S/cp, B, N | G, D], value [S/cp, B, G, E] -> [S/cp, B, N * E]; all local to the tp rank."""
        assert packed_seq_params is None, "documents come as attention_mask [B, S], not as packed_seq_params"
        assert attention_bias is None, "torch's fused attention takes no bias"
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))  # [B, heads, S, D]
        if self.cache is not None:
            out = self.cache.attend(q, k, v, scale=self.scale)
        elif self.over is not None:
            out = attend(q, k, v, attention_mask, scale=self.scale, over=self.over)
        elif attention_mask is None:
            out = self._attend(q, k, v)
        else:
            out = torch.cat(
                [
                    self._attend_documents(q[b : b + 1], k[b : b + 1], v[b : b + 1], attention_mask[b])
                    for b in range(len(q))
                ]
            )
        s, b = query.shape[:2]
        return out.permute(2, 0, 1, 3).reshape(s, b, -1)

    def _attend_documents(self, q: Tensor, k: Tensor, v: Tensor, documents: Tensor) -> Tensor:
        """Causal attention inside each document of one sample: [1, heads, S, D] -> the same; ``documents`` [S]."""
        cuts = (torch.nonzero(documents[1:] != documents[:-1]).flatten() + 1).tolist()
        bounds = list(zip([0, *cuts], [*cuts, len(documents)], strict=True))
        return torch.cat([self._attend(q[:, :, i:j], k[:, :, i:j], v[:, :, i:j]) for i, j in bounds], dim=2)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Causal attention of [B, N, S, D] over keys [B, G, S, D] and values [B, G, S, E]."""
        dropout = self.dropout if self.training else 0.0
        if dropout > 0.0 and q.device.type == "cpu":
            return _blockwise(q, k, v, self.scale, dropout)
        width = v.shape[-1]
        q, k, v = of_one_width(q, k, v)  # torch would write the scores out for two widths
        out = F.scaled_dot_product_attention(
            q, k, v, dropout_p=dropout, is_causal=True, scale=self.scale, enable_gqa=k.shape[1] != q.shape[1]
        )
        return out[..., :width]


def _blockwise(q: Tensor, k: Tensor, v: Tensor, scale: float, dropout: float) -> Tensor:
    """Attention with dropout where torch has no fused kernel: blocks of query rows, recomputed in the backward pass."""
    groups = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(groups, dim=1) for x in (k, v))

    def block(rows: Tensor, keys: Tensor, values: Tensor, start: int) -> Tensor:
        scores = (rows @ keys.transpose(-1, -2)) * scale
        position = torch.arange(start, start + rows.shape[2], device=rows.device)
        future = torch.arange(keys.shape[2], device=rows.device)[None, :] > position[:, None]
        probabilities = torch.softmax(scores.masked_fill(future, float("-inf")), dim=-1)
        return F.dropout(probabilities, dropout) @ values

    out = []
    for start in range(0, q.shape[2], QUERY_BLOCK):
        stop = min(start + QUERY_BLOCK, q.shape[2])
        rows = q[:, :, start:stop], k[:, :, :stop], v[:, :, :stop]
        out.append(checkpoint(block, *rows, start, use_reentrant=False))
    return torch.cat(out, dim=2)
