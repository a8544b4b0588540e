"""Logical ranks on other process places: what a launcher's environment becomes."""

from __future__ import annotations

import pytest

from megatron_slm.errors import LaunchError
from megatron_slm.launch.environment import from_environment, rotated
from megatron_slm.launch.local import cores_of
from tests.unit.test_launch_environment import SRUN, TORCHRUN


def test_rotated_ranks_keep_the_device_of_their_slot() -> None:
    plain = from_environment(TORCHRUN)
    moved = from_environment({**TORCHRUN, "MSLM_ROTATE_RANKS": "3"})
    assert plain is not None and moved is not None and plain.slot == plain.rank == 5
    assert (moved.rank, moved.slot, moved.local_rank) == (2, 5, 1), "slot 5 runs rank 2 on its own device"
    written = moved.to_environ()
    assert written["RANK"] == "2" and written["MSLM_SLOT"] == "5"
    assert from_environment({**TORCHRUN, "MSLM_ROTATE_RANKS": "3", **written}) == moved, "moved once, not again"


def test_every_rank_runs_once() -> None:
    places = [from_environment({**SRUN, "SLURM_PROCID": str(slot), "MSLM_ROTATE_RANKS": "4"}) for slot in range(11)]
    assert [place.rank for place in places if place is not None] == [(slot - 4) % 11 for slot in range(11)]
    sound = from_environment(SRUN)
    assert sound is not None and rotated(sound, 11) == sound, "all the way round is where it was"
    with pytest.raises(LaunchError, match="MSLM_ROTATE_RANKS='one' is not a whole number"):
        from_environment({**SRUN, "MSLM_ROTATE_RANKS": "one"})


def test_cores_are_shared_out_where_there_are_enough() -> None:
    assert [cores_of(slot, 2, 2, [7, 3, 5, 4]) for slot in (0, 1)] == [[3, 4], [5, 7]]
    assert cores_of(1, 2, 3, [7, 3, 5, 4]) == [7, 3, 5, 4], "threads that share a core would be other threads"
