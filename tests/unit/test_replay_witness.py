"""What a run keeps of its first steps: read as it was written, and judged without ranks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megatron_slm.parallel import device

device.preload("cpu")

from megatron_slm.errors import CheckpointError  # noqa: E402
from megatron_slm.replay import witness  # noqa: E402
from megatron_slm.replay.shards import Shard  # noqa: E402
from megatron_slm.replay.watch import FORWARD, Place, Watched  # noqa: E402
from megatron_slm.verify.tolerance import Unit  # noqa: E402
from megatron_slm.verify.witnessed import COPIES, WEIGHTS, Judge, common_factor, drifted_copies  # noqa: E402

ALONE = Place(tp=0, tp_size=1, cp=0, cp_size=1, dp=0, dp_size=1, pp=0, pp_size=1)
JUDGE = Judge(Unit("fp32"), gated=False)


def shard(name: str, values: torch.Tensor, start: int = 0, size: int | None = None) -> Shard:
    return Shard(name, (size or len(values),), (slice(start, start + len(values)),), values)


def step(dp: int = 0, weight: float = 1.0, output: float = 1.0, gradient: float = 1.0) -> witness.Witnessed:
    """One replica of two, of a model of two norms."""
    names = ("decoder.layers.0.input_layernorm", "decoder.final_layernorm")
    ramp = torch.arange(1.0, 5.0)
    return witness.Witnessed(
        ALONE._replace(dp=dp, dp_size=2 if dp else 1),
        [shard(f"{name}.weight", ramp * weight) for name in names],
        [Watched(name, FORWARD, 0, ramp.view(4, 1, 1) * output) for name in names],
        [shard(f"{name}.weight", ramp * gradient) for name in names],
        loss=output,
        grad_norm=gradient,
    )


def test_a_step_is_read_as_it_was_written_and_damage_is_told(tmp_path: Path) -> None:
    folder = tmp_path / "replay" / witness.FOLDER
    folder.mkdir(parents=True)
    for rank in range(2):
        torch.save(witness._plain(step(rank)), folder / f"step_0000001_rank_{rank:05d}.pt")
    assert witness.steps_in(tmp_path) == [1]
    first, second = witness.read(tmp_path, 1)
    assert second.place.dp == 1 and first.weights[0].place == (slice(0, 4),)
    assert first.watched[1].values.equal(step().watched[1].values) and second.grad_norm == 1.0
    (folder / "step_0000001_rank_00001.pt").write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match=r"rank_00001\.pt is damaged"):
        witness.read(tmp_path, 1)


def test_the_first_of_what_deviates_is_named() -> None:
    assert JUDGE.first(1, step(), step(), [step()]) is None
    for what, other in ((WEIGHTS, step(weight=1.1)), (FORWARD, step(output=1.1)), ("gradient", step(gradient=2.0))):
        found = JUDGE.first(1, step(), step(), [other])
        assert found is not None and found.what == what
    assert found.module == "reduction of the gradients" and found.detail == "all gradients are 2 times one rank's"
    found = JUDGE.first(2, step(), step(), [step(), step(1, weight=1.5)])
    assert found is not None and (found.module, found.what) == ("decoder.layers.0.input_layernorm", COPIES)
    assert found.step == 2 and "rank 1" in found.detail


def test_copies_are_compared_where_they_are_of_the_same_part() -> None:
    ones = torch.ones(2)
    halves = [[shard("cut", ones, 0, 4)], [shard("cut", 2 * ones, 2, 4)]]
    assert not drifted_copies(halves), "other parts may be other"
    assert drifted_copies([*halves, [shard("cut", ones, 2, 4)]]) == {"cut": (1, 2)}


def test_a_common_factor_is_one_of_all_tensors() -> None:
    one, other = torch.arange(1.0, 5.0), torch.tensor([3.0, -1.0])
    assert common_factor([one * 0.5, other * 0.5], [one, other]) == pytest.approx(0.5)
    assert common_factor([one * 0.5, other * 0.6], [one, other]) is None
    assert common_factor([], []) is None
