"""Rules about what is profiled."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_slm.config.facts import Facts
from megatron_slm.errors import ConfigError
from megatron_slm.profile.config import EVERY, NSYS, TOOLS, TORCH, Steps

STEPS, RANKS, TOOL = "profile.profile_steps", "profile.profile_ranks", "profile.profile_tools"


def profiled_steps(facts: Facts) -> Iterator[str]:
    """The steps are steps, and the run makes them."""
    own, last = facts.config.profile, facts.config.train.train_iters
    if own.profile_steps is None:
        if given := [key for key in (RANKS, TOOL) if facts.is_set(key)]:
            yield f"{facts.cite(*given)}: nothing is profiled without {STEPS}. Name the steps, or leave it out."
        return
    try:
        steps = Steps.parse(own.profile_steps)
    except ConfigError as error:
        yield f"{facts.cite(STEPS)}: {error}"
        return
    if steps.last > last:
        yield (
            f"{facts.cite(STEPS, 'train.train_iters')}: the run ends before step {steps.last}. Profile steps up to "
            f"{last}, or make more."
        )


def profiled_ranks(facts: Facts) -> Iterator[str]:
    """The ranks are ranks of the job."""
    own = facts.config.profile.profile_ranks
    if not own:
        yield f"{facts.cite(RANKS)}: name at least one rank, or {EVERY}."
    wrong = [text for text in own if text != EVERY and not (text.isdecimal() and int(text) < facts.world_size)]
    if wrong:
        yield (
            f"{facts.cite(RANKS)}: {', '.join(wrong)} is no rank of this job; its ranks are 0 to "
            f"{facts.world_size - 1}, or {EVERY}."
        )


def profiling_tools(facts: Facts) -> Iterator[str]:
    """The tools exist, and do not get in each other's way."""
    own = facts.config.profile.profile_tools
    if wrong := [tool for tool in own if tool not in TOOLS]:
        yield f"{facts.cite(TOOL)}: {', '.join(wrong)} is none of {', '.join(TOOLS)}."
    if not own:
        yield f"{facts.cite(TOOL)}: name at least one of {', '.join(TOOLS)}."
    if TORCH in own and NSYS in own:
        yield (
            f"{facts.cite(TOOL)}: both trace the device through CUPTI, which serves one of them at a time. Make two "
            "runs."
        )


RULES = (profiled_steps, profiled_ranks, profiling_tools)
