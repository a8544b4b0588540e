"""Keys and values of the tokens that a model has read already, so that a new token costs one row instead of its prefix.

Every attention core has a cache of its own; which columns are filled is the same for all and lies in ``Columns``. The
sequences of a batch end in the same column: shorter ones are padded on the left, and nobody attends to the padding.

Shapes: B batch, N query heads and G key/value heads of this tp rank, S rows of the pass, C columns, D width of queries
and keys, E width of values. Multi-latent attention is cached as what it attends to: a key and a value of every head.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_slm.parallel.block_attention import of_one_width


class Columns:
    """What the caches of all layers have in common.

    Args:
        lengths: tokens of each row's prompt, int64 [B].
        capacity: columns that are held at most.
    """

    def __init__(self, lengths: Tensor, capacity: int) -> None:
        widest = int(lengths.max())
        self.capacity = capacity
        self.starts = widest - lengths
        """[B], the column of each row's first token."""
        self.padded = bool((self.starts > 0).any())
        self.filled = 0
        self.new = 0
        self.mask: Tensor | None = None
        """bool [B, 1, new, filled + new]: what a row of this pass sees; None: every column up to its own."""

    def begin(self, new: int) -> Tensor:
        """A pass over ``new`` columns begins; gives the position of each in its row, [B, new], 0 in the padding."""
        self.new = new
        column = torch.arange(self.filled, self.filled + new, device=self.starts.device)
        self.mask = self._mask(column) if self.padded or (self.filled and new > 1) else None
        return (column - self.starts[:, None]).clamp(min=0)

    def _mask(self, column: Tensor) -> Tensor:
        seen = torch.arange(self.filled + self.new, device=column.device)
        own = seen == column[:, None]  # a row of the padding sees itself: of nothing at all, softmax is NaN
        visible = (seen <= column[:, None]) & (seen >= self.starts[:, None, None])
        return (visible | own)[:, None]

    def end(self) -> None:
        """The pass is over, its columns are filled."""
        self.filled += self.new
        self.mask = None

    def keep(self, rows: Tensor) -> None:
        """Go on with ``rows`` alone."""
        self.starts = self.starts[rows]
        self.padded = bool((self.starts > 0).any())


class KeyValueCache:
    """The keys and values of one attention core. Memory is taken at the first pass, for all columns at once."""

    def __init__(self, columns: Columns) -> None:
        self._columns = columns
        self._keys: Tensor | None = None
        self._values: Tensor | None = None

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *, scale: float) -> Tensor:
        """q [B, N, S, D], k [B, G, S, D], v [B, G, S, E] -> [B, N, S, E], causal over all columns.

        The last ``columns.new`` rows are new tokens. What stands before them is there to divide the sequence evenly
        over tp: it is not kept, nobody sees it, and its output is 0.
        """
        width, filling = v.shape[-1], q.shape[2] - self._columns.new
        q, k, v = of_one_width(*(x[:, :, filling:] for x in (q, k, v)))
        keys, values = self._with(k, v)
        mask = self._columns.mask
        grouped = k.shape[1] != q.shape[1]
        if self._columns.filled == 0 and mask is None:
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=grouped)
        elif self._columns.new == 1:
            # The query heads of a group are rows over the same keys: nothing is copied for them.
            rows = q.reshape(*k.shape[:2], -1, q.shape[-1])
            out = F.scaled_dot_product_attention(rows, keys, values, attn_mask=mask, scale=scale).reshape(q.shape)
        else:
            out = F.scaled_dot_product_attention(q, keys, values, attn_mask=mask, scale=scale, enable_gqa=grouped)
        return F.pad(out[..., :width], (0, 0, filling, 0))

    def _with(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """The columns up to and with the new ones."""
        before, after = self._columns.filled, self._columns.filled + self._columns.new
        if self._keys is None or self._values is None:
            self._keys, self._values = (x.new_empty(*x.shape[:2], self._columns.capacity, x.shape[-1]) for x in (k, v))
        self._keys[:, :, before:after], self._values[:, :, before:after] = k, v
        return self._keys[:, :, :after], self._values[:, :, :after]

    def keep(self, rows: Tensor) -> None:
        """Go on with ``rows`` alone."""
        if self._keys is not None and self._values is not None:
            self._keys, self._values = self._keys[rows], self._values[rows]
