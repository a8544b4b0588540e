"""The section ``replay``: its rules and the flag of the command line."""

from __future__ import annotations

import pytest

from megatron_slm.config.flags import read
from megatron_slm.config.load import load
from megatron_slm.config.rules import violations

BROKEN = {
    "no steps": (("replay.level=op",), "name the steps"),
    "steps of another level": (("replay.op_steps=3",), "would be ignored"),
    "no numbers": (("replay.level=op", "replay.op_steps=3,last"), "last is no step"),
    "step 0": (("replay.level=op", "replay.op_steps=0"), "0 is no step"),
    "a fault that nothing finds": (("replay.on_fault=continue",), "no fault would be found"),
    "scales of earlier passes": (("replay.sdc_every=5", "precision.fp8=e4m3", "precision.bf16=true"), "earlier passes"),
    "a step that is passed over": (("replay.level=op", "replay.op_steps=10,15", "replay.every=10"), "step 15"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_rule_is_said(name: str) -> None:
    overrides, words = BROKEN[name]
    found = violations(load(None, ["name=x", *overrides]).config)
    assert len(found) == 1 and words in found[0] and "replay." in found[0]


def test_valid_sections() -> None:
    for overrides in (["replay.level=light"], ["replay.level=op", "replay.op_steps=10,20", "replay.every=5"]):
        assert violations(load(None, ["name=x", *overrides]).config) == []


def test_passes_made_again() -> None:
    found = load(None, ["name=x", *read(["--sdc-every", "50"]).overrides, "replay.on_fault=continue"]).config
    assert (found.replay.sdc_every, found.replay.on_fault) == (50, "continue") and violations(found) == []


def test_record_is_the_level() -> None:
    assert load(None, ["name=x", *read(["--record", "layer"]).overrides]).config.replay.level == "layer"
