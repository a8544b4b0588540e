"""A run that reads through DALI is the run that reads without it, stopped and resumed too."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_slm.config import rules_packages
from tests import runs

pytestmark = pytest.mark.skipif(
    not rules_packages.installed("nvidia.dali"),
    reason=f"NVIDIA DALI is not installed: pip install {rules_packages.DALI}",
)


def test_losses_are_bitwise_those_of_torch(tmp_path: Path) -> None:
    """Two data-parallel ranks; the batch grows, and the loader changes from one start of the run to the next."""
    data = runs.corpus(tmp_path)
    growing = ("train.rampup_batch_size=4,4,8", "train.micro_batch_size=2", "data.eod_mask_loss=true")
    assert runs.train(tmp_path / "torch", data, 2, *growing, "train.train_iters=4") == 0
    through = tmp_path / "dali"
    assert (
        runs.train(through, data, 2, *growing, "data.loader=dali", "train.train_iters=4", "train.exit_interval=3") == 75
    )
    assert runs.train(through, data, 2, *growing, "data.loader=dali", "train.train_iters=4") == 0
    wanted, found = (runs.records(tmp_path / name) for name in ("torch", "dali"))
    for key in ("lm_loss_bits", "sample_digest", "consumed_samples"):
        assert [one[key] for one in found] == [one[key] for one in wanted], key
