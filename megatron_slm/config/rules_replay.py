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


RULES = (recorded_operations,)
