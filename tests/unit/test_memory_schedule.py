"""Order and holdings of a pipeline rank: what core's own schedules do with chunks that compute nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from megatron_slm.memory.exchange import held
from megatron_slm.memory.schedule import BACKWARD, FINISH, FORWARD, UPDATE, Turn, turns, warm_up
from megatron_slm.parallel import device

device.preload("cpu")

import torch  # noqa: E402
from megatron.core.enums import ModelType  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from megatron_slm.config.load import load  # noqa: E402
from megatron_slm.memory.trace import Recorder  # noqa: E402
from megatron_slm.model.core_config import transformer_config  # noqa: E402
from megatron_slm.parallel.dry import dry_world  # noqa: E402
from megatron_slm.parallel.pipeline import run_schedule  # noqa: E402

LENGTH, HIDDEN = 6, 32
Note = Callable[[str, int, int], None]


class _Pass(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, received: Tensor, note: Note, chunk: int, micro_batch: int) -> Tensor:
        ctx.note, ctx.place = note, (chunk, micro_batch)
        note(FORWARD, chunk, micro_batch)
        return torch.empty(LENGTH, 1, HIDDEN)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        ctx.note(BACKWARD, *ctx.place)
        return torch.empty(LENGTH, 1, HIDDEN), None, None, None


class Chunk(nn.Module):
    """What core's schedules ask of a model chunk; it tells when it is passed."""

    def __init__(self, config: Any, index: int, note: Note, *, begins: bool, ends: bool) -> None:
        super().__init__()
        self.config, self.vp_stage, self.note, self.begins, self.ends = config, index, note, begins, ends
        self.weight = nn.Parameter(torch.zeros(1))
        self.model_type = ModelType.encoder_or_decoder
        self.received: Tensor | None = None
        self.micro_batch = 0

    def set_input_tensor(self, received: list[Tensor]) -> None:
        """As the decoder keeps it."""
        self.received = received[0]

    def forward(self, **_: Any) -> Tensor:
        """A pass without anything in it."""
        received = self.weight if self.begins or self.received is None else self.received
        output: Tensor = _Pass.apply(received, self.note, self.vp_stage, self.micro_batch)
        self.micro_batch += 1
        return output.sum() if self.ends else output


def played(rank: int, stages: int, chunks: int, micro_batches: int, *, frees_outputs: bool) -> list[tuple[Turn, int]]:
    """What core does in a second step: its turns, and tensors between pipeline ranks that exist in each."""
    overrides = [
        f"model.num_layers={stages * chunks}", f"model.hidden_size={HIDDEN}", f"model.seq_length={LENGTH}",
        "model.num_attention_heads=4", f"parallel.pipeline_model_parallel_size={stages}",
    ]  # fmt: skip
    if chunks > 1:
        overrides.append(f"parallel.virtual_pipeline_model_parallel_size={chunks}")
    config = load(None, overrides).config
    found: list[tuple[Turn, int]] = []
    with dry_world(config.parallel, rank=rank, world_size=stages) as groups, Recorder() as recorder:
        core = transformer_config(config.model, config.parallel, config.precision, config.train, device="cpu")

        def note(name: str, chunk: int, micro_batch: int) -> None:
            sizes = [recorder.blocks[number].size for number in recorder.alive()]
            found.append((Turn(name, chunk, micro_batch), sizes.count(LENGTH * HIDDEN * 4)))

        core.deallocate_pipeline_outputs = frees_outputs
        core.finalize_model_grads_func = lambda *_, **__: note(FINISH, 0, 0)
        model: list[nn.Module] = [
            Chunk(core, i, note, begins=rank == i == 0, ends=rank == stages - 1 and i == chunks - 1)
            for i in range(chunks)
        ]
        batch = {name: torch.zeros(1, LENGTH) for name in ("tokens", "labels", "position_ids", "loss_mask")}
        for _ in range(2):
            found.clear()
            for chunk in model:
                chunk.micro_batch = 0
            run_schedule(
                model,
                [batch] * micro_batches,
                lambda output, _: (output, torch.ones((), dtype=torch.int), {}),
                forward_only=False,
                seq_length=LENGTH,
                groups=groups,
            )
            note(UPDATE, 0, 0)
    return found


PIPELINES = [
    (stages, chunks, micro_batches)
    for stages, chunks, micro_batches in (
        (1, 1, 3), (2, 1, 1), (2, 1, 4), (4, 1, 2), (4, 1, 6), (2, 2, 2), (2, 2, 6), (2, 3, 4), (4, 2, 4), (4, 2, 8),
        (4, 3, 8),
    )
]  # fmt: skip


@pytest.mark.parametrize("frees_outputs", [False, True], ids=["keeps outputs", "frees outputs"])
@pytest.mark.parametrize(("stages", "chunks", "micro_batches"), PIPELINES)
def test_turns_and_holdings_are_those_of_core(
    stages: int, chunks: int, micro_batches: int, frees_outputs: bool
) -> None:
    for rank in range(stages):
        found = played(rank, stages, chunks, micro_batches, frees_outputs=frees_outputs)
        assert [turn for turn, _ in found] == turns(rank, stages, chunks, micro_batches)
        if stages > 1:
            expected = held(rank, stages, chunks, micro_batches, frees_outputs=frees_outputs)
            assert [count for _, count in found] == expected, f"rank {rank}"


def test_a_pipeline_of_one_exchanges_nothing() -> None:
    assert held(0, 1, 1, 4, frees_outputs=False) == [0] * 10


def test_warm_up_is_the_paper_s() -> None:
    """arXiv 2104.04473: p - r - 1 passes; interleaved 2 (p - r - 1) + (v - 1) p, but no more than there are."""
    assert [warm_up(rank, 4, 1, 8) for rank in range(4)] == [3, 2, 1, 0]
    assert [warm_up(rank, 4, 2, 8) for rank in range(4)] == [10, 8, 6, 4]
    assert warm_up(0, 4, 2, 4) == 8
