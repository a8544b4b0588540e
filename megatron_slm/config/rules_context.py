"""Rules about context parallelism: a sequence divided over ranks, and what its attention cannot do."""

from __future__ import annotations

import math
from collections.abc import Iterator

from megatron_slm.config.facts import Facts
from megatron_slm.config.rules_layout import TP
from megatron_slm.parallel.layout import nearest_multiples

CP = "parallel.context_parallel_size"
EXCHANGE = "parallel.cp_comm_type"


def sequence_chunks(facts: Facts) -> Iterator[str]:
    """A sequence is two equal chunks on every cp rank, which sequence parallelism divides over tp."""
    parallel, length = facts.config.parallel, facts.config.model.seq_length
    cp, tp = parallel.context_parallel_size, parallel.tensor_model_parallel_size
    multiple = cp * (math.lcm(2, tp) if parallel.sequence_parallel else 2)
    if cp == 1 or length % multiple == 0:
        return
    keys = [CP, TP] if parallel.sequence_parallel else [CP]
    also = f", and its tokens divide evenly over the {tp} tp ranks of sequence_parallel" if len(keys) > 1 else ""
    yield (
        f"{facts.cite('model.seq_length', *keys)}: a sequence is cut into 2 x cp = {2 * cp} equal chunks, of which "
        f"each rank holds an early and a late one{also}. {nearest_multiples('model.seq_length', length, multiple)}"
    )


def attention_dropout(facts: Facts) -> Iterator[str]:
    """Attention over cp ranks has no dropout."""
    if facts.config.parallel.context_parallel_size > 1 and facts.config.model.attention_dropout > 0.0:
        yield (
            f"{facts.cite('model.attention_dropout', CP)}: attention over several cp ranks has no dropout of its "
            f"probabilities. Set model.attention_dropout=0, or {CP}=1."
        )


def exchange(facts: Facts) -> Iterator[str]:
    """The way keys are exchanged means something where they are."""
    if facts.is_set(EXCHANGE) and facts.config.parallel.context_parallel_size == 1:
        yield (
            f"{facts.cite(EXCHANGE, CP)}: with whole sequences on every rank nothing is exchanged, and the former "
            f"would be ignored. Leave it out, or raise {CP}."
        )


RULES = (sequence_chunks, attention_dropout, exchange)
