"""A checkpoint asked what tasks ask, on one rank or divided over several: what ``mslm eval`` measures."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from megatron_slm import run_generate
from megatron_slm.config.load import load
from megatron_slm.config.run_config import RunConfig
from megatron_slm.errors import CheckpointError, ConfigError
from megatron_slm.run_generate import Manner, Speaker

if TYPE_CHECKING:
    from megatron_slm.data.examples.encoding import ExampleEncoder
    from megatron_slm.evaluate.items import Item, Task
    from megatron_slm.evaluate.lm_eval import Opened
    from megatron_slm.evaluate.scoring import Reader, Scored
    from megatron_slm.launch.environment import RankEnvironment


@dataclass(frozen=True)
class Wanted:
    """What is to be measured, and how.

    Attributes:
        tasks: files of items, see ``evaluate.items``.
        data: directories of compiled examples or of a corpus, whose valid splits are held-out text.
        limit: items of a task at most; of ``data`` without it 1,000.
        template: that prompts are written with; None takes them as they are.
        samples: answers drawn for each prompt.
        batch_size: prompts answered at a time, and four times the rows read at a time.
        verifiers: processes that judge answers, each answer in at most ``timeout_s`` seconds.
    """

    tasks: tuple[Path, ...]
    data: tuple[Path, ...] = ()
    limit: int | None = None
    template: str | None = None
    samples: int = 1
    manner: Manner = Manner(temperature=0.0, top_k=0)
    batch_size: int = 16
    verifiers: int = 2
    timeout_s: float = 10.0

    @property
    def settings(self) -> dict[str, Any]:
        """What the numbers of a result depend on beside the model and the items."""
        return {**asdict(self.manner), "samples": self.samples, "template": self.template}


class Answered(NamedTuple):
    """What a model has said of a task: scores of every item's documents, or texts."""

    task: Task
    scored: list[list[Scored]]
    texts: list[list[str]]


def evaluate(run: Path, wanted: Wanted, *, environment: RankEnvironment | None = None) -> dict[str, Any] | None:
    """The result of all tasks, as JSON, on the first rank; None on the others. Collective.

    Args:
        run: a run's directory, or one of its checkpoints.
        environment: this rank's, where the model is divided as its configuration says; None is one rank alone.

    Raises:
        ConfigError, CheckpointError, DataError: what is asked, or who, is refused.
    """
    if wanted.samples > 1 and wanted.manner.temperature == 0.0:
        raise ConfigError(f"--samples {wanted.samples} at --temperature 0 are all the same; give --temperature 0.8.")
    from megatron_slm.evaluate.items import require_rows

    for path in wanted.tasks:
        require_rows(path, wanted.limit)
    with run_generate.speaker(run, ema=wanted.manner.ema, environment=environment) as speaker:
        from megatron_slm.train import recovery

        found = recovery.find(run, hashes=False)
        config = load(found.path / "config.yaml").config
        encoder = _encoder(speaker, wanted.template)
        tasks = _tasks(speaker, encoder, wanted)
        reader = _reader(speaker, config, wanted)
        answered = [_answered(speaker, reader, task, wanted, encoder) for task in tasks]
    if environment is not None and environment.rank != 0:
        return None
    from megatron_slm.evaluate.compare import RESULT_VERSION

    return {
        "result_version": RESULT_VERSION,
        "model": str(found.path),
        "step": found.state.step,
        "tokenizer_hash": found.state.tokenizer_hash,
        "settings": wanted.settings,
        "tasks": [_result(one, wanted) for one in answered],
    }


@contextmanager
def opened_alone(run: Path) -> Iterator[Opened]:
    """A checkpoint on one rank for the evaluation harness, as long as this block lasts."""
    with run_generate.speaker(run) as speaker:
        from megatron_slm.evaluate.lm_eval import Opened
        from megatron_slm.train import recovery

        config = load(recovery.find(run, hashes=False).path / "config.yaml").config

        def answer(prompts: Sequence[Sequence[int]], max_new_tokens: int, temperature: float) -> list[str]:
            wanted = Wanted((), manner=Manner(max_new_tokens, temperature, top_k=0))
            return [texts[0] for texts in _texts(speaker, prompts, wanted, [])]

        yield Opened(speaker.tokenizer, _reader(speaker, config, Wanted(())).read, answer, speaker.position_limit)


def _encoder(speaker: Speaker, template: str | None) -> ExampleEncoder | None:
    if template is None:
        return None
    from megatron_slm.data.examples.encoding import ExampleEncoder
    from megatron_slm.data.examples.special_tokens import TemplateTokenizer
    from megatron_slm.data.examples.template import open_template

    own = None if template == "own" else template
    return ExampleEncoder(TemplateTokenizer(speaker.tokenizer), open_template(own, speaker.tokenizer))


def _tasks(speaker: Speaker, encoder: ExampleEncoder | None, wanted: Wanted) -> list[Task]:
    from megatron_slm.evaluate.compiled import compiled_task
    from megatron_slm.evaluate.items import Asker

    asker = Asker(speaker.tokenizer, encoder, speaker.position_limit)
    tasks = [
        compiled_task(path, speaker.tokenizer, window=speaker.position_limit, limit=wanted.limit or 1000)
        for path in wanted.data
    ]
    tasks += [asker.task(path, wanted.limit) for path in wanted.tasks]
    names = [task.name for task in tasks]
    if len(set(names)) < len(names):
        raise ConfigError(f"Two tasks are named {max(names, key=names.count)}; rename a file.")
    return tasks


def _reader(speaker: Speaker, config: RunConfig, wanted: Wanted) -> Reader:
    """The model with an ending that scores labels."""
    from megatron_slm.evaluate.confidence import ConfidentScores
    from megatron_slm.evaluate.scoring import Reader
    from megatron_slm.parallel.gradients import unwrap
    from megatron_slm.parallel.vocab_scores import Vocabulary
    from megatron_slm.rollout.score import scores

    chunks, groups, device = speaker.built
    vocabulary = Vocabulary(config.model.vocab_size or speaker.tokenizer.vocab_size)
    for chunk in map(unwrap, chunks):
        if chunk.post_process:
            chunk.ending = ConfidentScores(vocabulary)
    return Reader(
        forward=partial(scores, chunks, groups=groups),
        multiple=groups.pp.size() if len(chunks) > 1 else 1,
        groups=groups,
        device=device,
        seq_length=speaker.position_limit,
        micro_batch_size=max(1, wanted.batch_size // 4),
        eod_id=speaker.tokenizer.eod_id,
    )


def _answered(speaker: Speaker, reader: Reader, task: Task, wanted: Wanted, encoder: ExampleEncoder | None) -> Answered:
    if task.kind == "generation":
        prompts = [item.prompt for item in task.items]
        return Answered(task, [], _texts(speaker, prompts, wanted, encoder.end_ids if encoder else []))
    found = iter(reader.read([document for item in task.items for document in item.documents]))
    scored = [[next(found) for _ in item.documents] for item in task.items]
    if not all(math.isfinite(one.logprobs.sum()) for each in scored for one in each):
        raise CheckpointError(
            f"A log-probability of the task {task.name} is not finite: the weights hold NaN or infinity."
        )
    return Answered(task, scored, [])


def _texts(speaker: Speaker, asked: Sequence[Sequence[int]], wanted: Wanted, end_ids: Sequence[int]) -> list[list[str]]:
    """``wanted.samples`` answers to each prompt. Collective."""
    from megatron_slm.rollout.generate import complete

    chunks, groups, device = speaker.built
    sampling = wanted.manner.sampling([speaker.tokenizer.eod_id, *end_ids])
    prompts = [prompt for prompt in asked for _ in range(wanted.samples)]
    found = complete(
        chunks,
        prompts,
        sampling,
        step=0,
        samples=range(len(prompts)),
        groups=groups,
        vocab_size=speaker.vocab_size,
        device=device,
        batch_size=wanted.batch_size,
    )
    decode = speaker.tokenizer.decode
    texts = []
    for prompt, one in zip(prompts, found, strict=True):
        drawn = one.tokens[:-1] if one.finished else one.tokens
        texts.append(decode([*prompt, *drawn])[len(decode(prompt)) :])
    return [texts[first : first + wanted.samples] for first in range(0, len(texts), wanted.samples)]


def _result(answered: Answered, wanted: Wanted) -> dict[str, Any]:
    """What one task amounts to."""
    from megatron_slm.evaluate import measures

    task, items = answered.task, answered.task.items
    if task.kind == "held_out":
        values, calibration = measures.held_out(items, answered.scored)
        return {**measures.measured(task, values, measures.rare_rates(items)), "calibration": calibration}
    if task.kind == "choice":
        values, calibration = measures.choices(items, answered.scored)
        return {**measures.measured(task, values), "calibration": calibration}
    if task.kind == "golden":
        return measures.measured(task, measures.golden(items, answered.scored))
    scores, causes = _judged(items, answered.texts, wanted)
    values = measures.generated(scores)
    found = measures.measured(task, values)
    ks = [k for k in (1, 2, 5, 10, 20, 50, 100) if k < wanted.samples]
    found["metrics"] |= measures.passes(values, sorted({*ks, wanted.samples}))
    for entry, own, texts in zip(found["items"], scores, answered.texts, strict=True):
        # NaN is no JSON.
        entry["samples"] = [
            {"text": text, "score": None if math.isnan(one) else one} for text, one in zip(texts, own, strict=True)
        ]
    found["first_failure"] = causes[0] if causes else None
    return found


def _judged(
    items: Sequence[Item], texts: Sequence[Sequence[str]], wanted: Wanted
) -> tuple[list[list[float]], list[str]]:
    """The score of each answer, NaN where its verifier fails, and why they have failed."""
    from megatron_slm.evaluate.registry import OF_THE_ROW
    from megatron_slm.evaluate.verifier_pool import VerifierPool
    from megatron_slm.evaluate.verifier_process import Asked

    asked = [Asked(OF_THE_ROW, text, item.fields) for item, own in zip(items, texts, strict=True) for text in own]
    with VerifierPool([OF_THE_ROW], workers=wanted.verifiers, timeout_s=wanted.timeout_s) as pool:
        found = pool.scores(asked)
    values = [one.value for one in found]
    causes = [f"item {items[at // wanted.samples].id}: {one.cause}" for at, one in enumerate(found) if one.cause]
    return [values[first : first + wanted.samples] for first in range(0, len(values), wanted.samples)], causes
