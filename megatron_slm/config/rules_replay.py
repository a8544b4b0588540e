"""Rules about what a run records of itself."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_slm.config.facts import Facts


def recorded_operations(facts: Facts) -> Iterator[str]:
    """The finest level is for chosen steps alone."""
    own = facts.config.replay
    level, steps = "replay.level", "replay.op_steps"
    wrong = [text for text in own.op_steps if not text.isdecimal() or int(text) < 1]
    if wrong:
        yield f"{facts.cite(steps)}: {', '.join(wrong)} is no step; steps are whole numbers from 1 on."
    elif own.level == "op" and not own.op_steps:
        yield f"{facts.cite(level, steps)}: name the steps whose every operation is recorded, as in {steps}=20,21."
    elif own.op_steps and own.level != "op":
        yield f"{facts.cite(steps, level)}: the steps would be ignored. Leave them out, or set {level}=op."
    elif missed := [text for text in own.op_steps if int(text) % own.every]:
        yield (
            f"{facts.cite(steps, 'replay.every')}: step {missed[0]} is not recorded at all. Choose multiples of "
            "replay.every."
        )


def repeated_passes(facts: Facts) -> Iterator[str]:
    """A pass that is made again must be able to give the same bits."""
    own, precision = facts.config.replay, facts.config.precision
    every, fault = "replay.sdc_every", "replay.on_fault"
    if own.sdc_every is None:
        if own.on_fault != "stop":
            yield f"{facts.cite(fault, every)}: no fault would be found. Leave it out, or set {every}."
    elif precision.fp8 is not None and precision.fp8_recipe == "delayed":
        yield (
            f"{facts.cite(every, 'precision.fp8_recipe')}: its scales come from earlier passes, so that a second pass "
            "of one step gives other bits. Choose another recipe, or leave replay.sdc_every out."
        )


RULES = (recorded_operations, repeated_passes)
