"""The training modules as a reader of unfinished sequences: a pass takes new tokens alone and gives the next logits.

For as long as :func:`incremental` lasts, every attention core has a cache (``parallel/kv_cache.py``), rotary embeddings
are those of each row's own positions, and the output layer sees the last column alone. Afterwards the modules are what
they were: nothing of a later training step changes.

Shapes: B batch, S new tokens of every row, H hidden, V padded vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.utils import get_attr_wrapped_model
from torch import Tensor, nn

from megatron_slm.errors import ConfigError
from megatron_slm.parallel.attention import SelfAttentionCore
from megatron_slm.parallel.gradients import gathered_parameters, unwrap
from megatron_slm.parallel.kv_cache import Columns, KeyValueCache


class Incremental:
    """One rank's part of one model copy. All methods are collective over its tp and pp ranks.

    Args:
        chunks: this rank's, wrapped or not.
        position_limit: positions that the model is defined for.
    """

    def __init__(self, chunks: Sequence[nn.Module], groups: Any, device: torch.device, position_limit: int) -> None:
        self.position_limit = position_limit
        self._chunks, self._groups, self._device = chunks, groups, device
        self._cores = [
            module for chunk in chunks for module in chunk.modules() if isinstance(module, SelfAttentionCore)
        ]
        self._columns = Columns(torch.ones(1, dtype=torch.int64), 1)
        self._positions = torch.zeros(1, 1, dtype=torch.int64)
        self._tables: dict[int, Tensor] = {}

    @property
    def ends_model(self) -> bool:
        """Whether this rank gives the logits."""
        return bool(self._groups.pp.rank() == self._groups.pp.size() - 1)

    def begin(self, lengths: Sequence[int], capacity: int) -> None:
        """Forget what was read; the next pass reads prompts of ``lengths``, padded on the left to the longest.

        Args:
            capacity: columns that will be read in all.
        """
        self._columns = Columns(torch.tensor(lengths, dtype=torch.int64, device=self._device), capacity)
        for core in self._cores:
            core.cache = KeyValueCache(self._columns)

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with ``rows`` of the batch alone."""
        chosen = torch.tensor(rows, dtype=torch.int64, device=self._device)
        self._columns.keep(chosen)
        for core in self._cores:
            assert core.cache is not None, "rows are chosen after a pass"
            core.cache.keep(chosen)

    @torch.no_grad()
    def read(self, tokens: Tensor) -> Tensor | None:
        """A pass over new tokens [B, S]: logits [B, V/tp] after the last one, on the ranks that end the model."""
        config = unwrap(self._chunks[0]).config
        # A row that is done is read on with the others of its batch; what comes of it is of no interest.
        positions = self._columns.begin(tokens.shape[1]).clamp(max=self.position_limit - 1)
        parts = self._groups.tp.size() if config.sequence_parallel else 1
        filling = -tokens.shape[1] % parts
        tokens, self._positions = F.pad(tokens, (filling, 0)), F.pad(positions, (filling, 0))
        received_shape = (tokens.shape[1] // parts, tokens.shape[0], config.hidden_size)
        stage, stages = self._groups.pp.rank(), self._groups.pp.size()
        logits = None
        for index, chunk in enumerate(self._chunks):
            if stage > 0 or index > 0:
                received = torch.empty(received_shape, dtype=config.pipeline_dtype, device=self._device)
                dist.recv(received, group=self._groups.pp, group_src=(stage - 1) % stages)
                get_attr_wrapped_model(chunk, "set_input_tensor")(received)
            output = chunk(input_ids=tokens, position_ids=self._positions, attention_mask=None)
            if stage == stages - 1 and index == len(self._chunks) - 1:
                logits = output[:, -1]
            else:
                dist.send(output.contiguous(), group=self._groups.pp, group_dst=(stage + 1) % stages)
        self._columns.end()
        return logits

    def own_positions(self, module: Any, inputs: Any, output: Any) -> Any:
        """Forward hook of rotary embeddings: the angles of each row's positions, [S, B, 1, D], not 0, 1, 2 ..."""
        if id(module) not in self._tables:
            found = module.get_emb(self.position_limit)
            self._tables[id(module)] = (found[0] if isinstance(found, tuple) else found)[:, 0, 0]
        angles = self._tables[id(module)][self._positions.t()][:, :, None]
        return (angles, *output[1:]) if isinstance(output, tuple) else angles

    def release(self) -> None:
        """Forget everything."""
        for core in self._cores:
            core.cache = None
        for chunk in self._chunks:
            get_attr_wrapped_model(chunk, "set_input_tensor")(None)


@contextmanager
def incremental(chunks: Sequence[nn.Module], *, groups: Any, device: torch.device) -> Iterator[Incremental]:
    """The chunks of a run as an :class:`Incremental`, in evaluation mode, for a while.

    Collective over the data-parallel ranks too where the gather of parameters is overlapped, and with experts divided
    over several ranks: those must make the same number of passes.

    Raises:
        ConfigError: the layout or the model cannot be read from a cache.
    """
    require_cacheable(chunks, groups)
    model = unwrap(chunks[0])
    reader = Incremental(chunks, groups, device, int(model.max_sequence_length))
    modes = [(module, module.training) for chunk in chunks for module in chunk.modules()]
    with ExitStack() as stack:
        stack.callback(reader.release)
        for module, training in modes:
            stack.callback(setattr, module, "training", training)
            if isinstance(module, RotaryEmbedding):
                stack.callback(module.register_forward_hook(reader.own_positions).remove)
        if reader.ends_model:
            output_layer = unwrap(chunks[-1]).output_layer
            stack.callback(output_layer.register_forward_pre_hook(last_column).remove)
        stack.enter_context(gathered_parameters([chunk for chunk in chunks if hasattr(chunk, "ddp_config")]))
        for chunk in chunks:
            chunk.eval()
        yield reader


def last_column(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """Forward pre-hook of the output layer: hidden states [S(/tp), B, H] -> the last row that each tp rank has."""
    return (inputs[0][-1:], *inputs[1:])


def require_cacheable(chunks: Sequence[nn.Module], groups: Any) -> None:
    """Refuse what a cache cannot serve.

    Raises:
        ConfigError: names the option and its value.
    """
    config = unwrap(chunks[0]).config
    if groups.cp.size() > 1:
        raise ConfigError(
            f"Text is not generated with parallel.context_parallel_size={groups.cp.size()}: a rank would hold a part "
            "of every cache. Set it to 1; the checkpoint can be loaded so."
        )
    layers = sum(len(unwrap(chunk).decoder.layers) for chunk in chunks)
    if layers > sum(isinstance(module, SelfAttentionCore) for chunk in chunks for module in chunk.modules()):
        raise ConfigError(
            "Text is generated with the attention of parallel/attention.py, which has the cache; these layers have "
            "Transformer Engine's. Set data.reset_attention_mask=true."
        )
    if config.moe_expert_capacity_factor is not None:
        raise ConfigError(
            f"Text is not generated with model.moe_expert_capacity_factor={config.moe_expert_capacity_factor}: which "
            "tokens an expert drops depends on the other sequences of the batch. Leave it out."
        )
    if groups.ep.size() > 1 and config.moe_token_dispatcher_type != "alltoall":
        raise ConfigError(
            f"Text is not generated with parallel.moe_token_dispatcher_type={config.moe_token_dispatcher_type} over "
            f"expert_model_parallel_size={groups.ep.size()}: it wants equally many tokens on every rank. Set alltoall."
        )
