"""Rules of learning from pairs, and of what a model forgets while it learns something else."""

from __future__ import annotations

import math
from collections.abc import Iterator

from megatron_slm.diagnose.finding import Finding
from megatron_slm.diagnose.records import Records, series_of
from megatron_slm.diagnose.robust import change, share_above

DISPLACED_NATS, DISPLACED_SHARE = 0.5, 0.05
"""How far the chosen answers' log-probability falls: a sequence is then less than 0.6 times as likely, and more than
5 % of its nats are lost (of long answers half a nat is nothing)."""
BELOW_REFERENCE = 0.9
"""Of the last quarter's steps: every batch is below the reference, not only an unlucky one."""
PREFERENCE_GAIN = 0.02
"""Of the accuracy on pairs: one pair of fifty."""
FORGOTTEN = 0.02
"""Of a held-out loss. The samples are the same each time, so that it moves by training alone; 2 % of 3 nats is what a
tenth of the tokens of a pretraining run bring."""
ACCURACY_LOST, ACCURACY_ERRORS = 0.02, 2.0
"""Of the accuracy on held-out tokens of chosen answers: one token of fifty, and two standard errors of a share over as
many tokens as there are pairs, for a slice may be so small that one token is more."""


def displacement(records: Records) -> Finding | None:
    """DPO makes both answers less likely, the rejected one faster: accuracy rises while the chosen side falls."""
    delta, accuracy = records.series("logps/chosen_delta"), records.series("rewards/accuracies")
    chosen, ranked = change(delta.quarter(0), delta.quarter(3)), change(accuracy.quarter(0), accuracy.quarter(3))
    size = abs(records.series("logps/chosen").values[0])
    # From 0, where it begins by definition: at a high rate the fall is over before the first quarter is.
    fallen = chosen.late < -max(DISPLACED_NATS, DISPLACED_SHARE * size, 3.0 * chosen.error)
    below = 1.0 - share_above(delta.quarter(3), 0.0)
    if not (fallen and below >= BELOW_REFERENCE and ranked.gain > PREFERENCE_GAIN):
        return None
    limit = -max(DISPLACED_NATS, DISPLACED_SHARE * size)
    step = next(step for step, value in zip(delta.steps, delta.values, strict=True) if value < limit)
    rejected = records.series("logps/rejected")
    other = change(rejected.quarter(0), rejected.quarter(3)) if len(rejected.values) >= 4 else None
    return Finding(
        name="likelihood-displacement",
        summary="the chosen answers become less likely while the pairs are told apart better",
        step=step,
        evidence=(
            f"logps/chosen_delta, median by quarter: {chosen.early:.3g} to {chosen.late:.3g} nats a sequence, below 0 "
            f"in {below:.0%} of the last quarter's steps",
            f"rewards/accuracies: {ranked.early:.3g} to {ranked.late:.3g}",
            *([f"logps/rejected: {other.early:.4g} to {other.late:.4g}"] if other else []),
        ),
        causes=(
            "the loss rewards the difference alone, and pairs that resemble each other share their tokens' gradients",
            f"no likelihood term (dpo.dpo_sft_weight {float(records.setting('dpo.dpo_sft_weight', 0.0)):g})",
            "the chosen answers are not the model's own: it never gave them much probability",
            f"dpo.dpo_beta {float(records.setting('dpo.dpo_beta', 0.1)):g} or the learning rate lets it go far",
        ),
        intervention="Set dpo.dpo_sft_weight=0.2 and start the stage anew from its parent; dpo.dpo_loss=apo_zero "
        "instead where the chosen answers are better than what the model says.",
    )


def forgetting(records: Records) -> Finding | None:
    """A held-out slice that the model could do gets worse while what the stage teaches gets better."""
    evidence = [*_of_sources(records), *_of_the_other_run(records), *_of_tokens(records)]
    if not evidence:
        return None
    return Finding(
        name="forgetting",
        summary="what the model could do before gets worse",
        step=min(step for step, _ in evidence),
        evidence=tuple(sentence for _, sentence in evidence),
        causes=(
            "nothing of the earlier data comes again (data.replay_run, data.replay_share)",
            "the learning rate or the number of epochs is too high for a fine-tuning stage",
            "the slice's share of the mixture is too small, or a phase has ended it",
            "preference training without a likelihood term (dpo.dpo_sft_weight)",
        ),
        intervention="Mix 5 % of the earlier run in (data.replay_run=RUN data.replay_share=0.05) and start the stage "
        "anew from its parent; if that is there, halve optimizer.lr.",
    )


def validated(records: Records) -> str:
    """What the rule about forgetting needs."""
    if any(_by_source(records, 2)) or (records.against and any(_common(records))):
        return ""
    if len(records.held_out("mean_token_accuracy").values) >= 2 and records.stage == "dpo":
        return ""
    return (
        "needs two validations with several sources (data.sources or data.replay_run, train.eval_interval), or "
        "--against the parent run"
    )


def _by_source(records: Records, fewest: int) -> Iterator[tuple[str, list[int], list[float]]]:
    """(source, steps, held-out losses) of every source that was validated often enough."""
    key = f"{records.loss_key}_by_source"
    rows = [{"step": record["step"], **record[key]} for record in records.validations if record.get(key)]
    for name in rows[-1] if rows else ():
        found = series_of(rows, name)
        if name != "step" and len(found.values) >= fewest:
            yield name, found.steps, found.values


def _of_sources(records: Records) -> Iterator[tuple[int, str]]:
    """Sources whose held-out loss has risen since its best, while another's falls to the end."""
    found = list(_by_source(records, 2))
    learned = [name for name, _, values in found if values[-1] < values[0] and values[-1] <= min(values) * 1.005]
    for name, steps, values in found:
        best = min(range(len(values)), key=values.__getitem__)
        if name not in learned and learned and values[-1] > values[best] * (1.0 + FORGOTTEN):
            yield (
                steps[best],
                f"held-out loss of {name}: {values[best]:.4f} at step {steps[best]}, {values[-1]:.4f} at step "
                f"{steps[-1]}, while that of {', '.join(learned)} falls",
            )


def _common(records: Records) -> Iterator[tuple[str, float, float, int]]:
    """(source, loss of the other run, loss of this one, step) of sources that both runs validate."""
    if records.against is None or records.against.loss_key != records.loss_key:
        return
    theirs = {name: values[-1] for name, _, values in _by_source(records.against, 1)}
    for name, steps, values in _by_source(records, 1):
        if name in theirs:
            yield name, theirs[name], values[-1], steps[-1]


def _of_the_other_run(records: Records) -> Iterator[tuple[int, str]]:
    for name, before, now, step in _common(records):
        if now > before * (1.0 + FORGOTTEN):
            yield step, f"held-out loss of {name}: {before:.4f} at the end of the other run, {now:.4f} at step {step}"


def _of_tokens(records: Records) -> Iterator[tuple[int, str]]:
    """DPO: the tokens of held-out chosen answers are guessed less often while the pairs are told apart better."""
    tokens, pairs = records.held_out("mean_token_accuracy"), records.held_out("rewards/accuracies")
    if records.stage != "dpo" or len(tokens.values) < 2 or len(pairs.values) < 2:
        return
    highest, number = max(tokens.values), max(1, records.validations[-1].get("loss_tokens") or 1)
    error = math.sqrt(highest * (1.0 - highest) / number)
    limit = highest - max(ACCURACY_LOST, ACCURACY_ERRORS * error)
    if tokens.values[-1] < limit and pairs.values[-1] > pairs.values[0]:
        best = tokens.steps[tokens.values.index(highest)]
        yield (
            best,
            f"held-out tokens of chosen answers: accuracy {highest:.3f} at step {best}, "
            f"{tokens.values[-1]:.3f} at step {tokens.steps[-1]}; of pairs {pairs.values[0]:.3f} to "
            f"{pairs.values[-1]:.3f}",
        )
