"""``mslm verify`` finds bugs of the catalogue; ``tests/bench/verify_faults.py`` plants all of them."""

from __future__ import annotations

import pytest

from megatron_slm.config import rules
from tests.bench.verify_faults import QUICK, judged
from tests.parallel_faults import FAULTS
from tests.verification import verified

BY_NAME = {fault.name: fault for fault in FAULTS}


def test_the_catalogue_is_of_many_bugs_on_every_axis() -> None:
    assert len(BY_NAME) == len({fault.plant for fault in FAULTS}) == len(FAULTS) >= 14
    assert {fault.axis for fault in FAULTS} == {"tp", "sp", "pp", "vpp", "dp", "cp", "ep", "recompute"}
    for fault in FAULTS:
        assert not rules.violations(fault.config, fault.config.parallel.world_size), fault.name
        assert (fault.plant.__doc__ or "").strip(), f"{fault.name}: what is wrong is not said"


@pytest.mark.parametrize("name", QUICK)
def test_a_bug_is_caught_and_named(name: str) -> None:
    fault = BY_NAME[name]
    found = judged(fault, verified([fault.config], fault.plant))
    assert found.caught, "verify reports equality, though the ranks' code is wrong"
    assert found.named, f"verify names {found.place}, the bug is in {fault.modules}"
    assert found.axis, f"verify blames {found.blamed}, the bug is on {fault.axis}"
