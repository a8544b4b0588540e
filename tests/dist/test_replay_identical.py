"""Equal runs of three ranks and more leave equal fingerprints; ``tests/bench/replay_identical.py`` has every mix."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from megatron_slm.replay import stream
from megatron_slm.replay.stream import Phase, StreamWriter
from tests import runs
from tests.bench.replay_identical import MIXES, Found, compared, twice
from tests.breadth import BREADTH


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.corpus(tmp_path_factory.mktemp("corpus"))


@BREADTH
@pytest.mark.parametrize("name", ["tp2 cp2 sp"])
def test_two_runs_are_identical(tmp_path: Path, data: Path, name: str) -> None:
    found = twice(tmp_path, data, MIXES[name], 4)
    assert (found.steps, found.differing, found.files_equal) == (4, 0, True)
    assert found.records > 4 * MIXES[name].ranks * 100, "every rank has recorded every step"


def test_the_comparison_sees_one_bit_and_what_one_run_alone_has(tmp_path: Path) -> None:
    def recorded(folder: Path, *, bit: int = 0, steps: int = 3) -> Path:
        writer = StreamWriter(folder, 0, step=0)
        for step in range(1, steps + 1):
            lanes = np.array([[step, bit if step == 2 else 0], [4, 5]], dtype=np.uint64)
            entries = [(Phase.LOSS, 0, writer.number("loss")), (Phase.PARAMETER, 0, writer.number("weight"))]
            writer.write(step, stream.records_of(entries, lanes))
        writer.close()
        return folder

    known = recorded(tmp_path / "known")
    assert compared(known, recorded(tmp_path / "same")) == Found(3, 6, 0, True)
    assert compared(known, recorded(tmp_path / "struck", bit=1)) == Found(3, 6, 1, False)
    assert compared(known, recorded(tmp_path / "longer", steps=4)) == Found(4, 8, 2, False)
