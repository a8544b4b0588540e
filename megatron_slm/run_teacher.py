"""A trained model reads compiled examples, and what it finds likeliest is stored: ``mslm data teacher``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from megatron_slm import run_generate
from megatron_slm.config.load import load
from megatron_slm.data.examples.document import Document
from megatron_slm.data.examples.store import ExampleStore
from megatron_slm.data.examples.teacher import TeacherRequest, TeacherStore
from megatron_slm.data.examples.teacher_writer import TeacherWriter
from megatron_slm.data.manifest import read_manifest, write_manifest
from megatron_slm.data.preparation.staging import Staging, open_staging, remove_leftover
from megatron_slm.errors import CheckpointError, DataError
from megatron_slm.run_generate import Speaker
from megatron_slm.train import manifest, recovery

if TYPE_CHECKING:
    from megatron_slm.evaluate.scoring import Reader
    from megatron_slm.launch.environment import RankEnvironment

SPLITS = ("train", "valid")
BLOCK = 256
"""Documents whose tokens are in memory at a time, a forward pass after another."""

ROW_MULTIPLE = 64
"""Rows are as long as the longest document, rounded up to this."""


@dataclass(frozen=True)
class Wanted:
    """What a teacher is asked.

    Attributes:
        run: a run's directory, or one of its checkpoints.
        examples: what `mslm data examples --kind chat` wrote.
        output: directory to write.
        top_k: tokens stored for each label.
        temperature: divides the logits.
        batch_size: rows read at a time.
    """

    run: Path
    examples: Path
    output: Path
    top_k: int = 64
    temperature: float = 1.0
    batch_size: int = 4


def store_teacher(wanted: Wanted, *, environment: RankEnvironment | None = None) -> dict[str, Any] | None:
    """Write what the teacher says of every label of the examples; ``output`` appears complete or not at all.

    Args:
        environment: this rank's, where the model is divided as its configuration says; None is one rank alone.

    Returns:
        The manifest on the first rank, with ``already_stored``: true where ``output`` held the same; None on others.

    Raises:
        ConfigError, CheckpointError, DataError: what is asked, or who, is refused.
    """
    first = environment is None or environment.rank == 0
    found = recovery.find(wanted.run, hashes=False)
    stores = _open_examples(wanted, found.state.tokenizer_hash)
    config = load(found.path / "config.yaml").config
    vocab_size = config.model.vocab_size or next(iter(stores.values())).vocab_size
    longest, limit = max(store.longest for store in stores.values()) - 1, config.model.position_limit
    if wanted.top_k > vocab_size:
        raise DataError(f"--top-k {wanted.top_k} is more than the teacher's vocabulary of {vocab_size}; lower it.")
    if longest > limit:
        raise DataError(
            f"{wanted.examples} holds an example of {longest} tokens, but the teacher reads {limit} at most. Compile "
            f"the examples with --seq-length {limit}."
        )
    request = TeacherRequest(
        teacher=manifest.sha256(found.path / manifest.MANIFEST),
        examples={name: store.digest for name, store in stores.items()},
        top_k=wanted.top_k,
        temperature=wanted.temperature,
    )
    target = wanted.output.absolute()
    if target.exists() or target.is_symlink():
        existing = {**_existing(target, request), "already_stored": True}
        return existing if first else None
    facts = {"top_k": wanted.top_k, "temperature": wanted.temperature, "vocab_size": vocab_size}
    with (
        run_generate.speaker(wanted.run, environment=environment) as speaker,
        _staged(target, request, first=first) as staging,
    ):
        length = min(limit, -(-longest // ROW_MULTIPLE) * ROW_MULTIPLE)
        reader = _reader(speaker, wanted, vocab_size, length)
        splits = {
            name: _split(reader, store, staging, name, {**facts, "checkpoint": str(found.path)})
            for name, store in stores.items()
        }
        if staging is None:
            return None
        written = write_manifest(staging.corpus, {"request": request.to_dict(), "splits": splits})
        staging.publish(target)
        return {**written, "already_stored": False}


def _open_examples(wanted: Wanted, tokenizer_hash: str) -> dict[str, ExampleStore]:
    """Every split of the examples."""
    there = [name for name in SPLITS if name == SPLITS[0] or (wanted.examples / name).exists()]
    stores = {name: ExampleStore.open(wanted.examples / name) for name in there}
    for store in stores.values():
        if store.kind != "chat":
            raise DataError(
                f"{store.directory} holds {store.kind} examples, but a distillation reads chats (--kind chat)."
            )
        if store.tokenizer_hash != tokenizer_hash:
            raise DataError(
                f"{store.directory} was made with the tokenizer {store.tokenizer_hash}, the teacher {wanted.run} with "
                f"{tokenizer_hash}: the same ids mean other text. Compile the examples with the teacher's tokenizer."
            )
    return stores


def _existing(target: Path, request: TeacherRequest) -> dict[str, Any]:
    """The manifest of ``target`` when it answers an equal request."""
    remedy = "Choose another output, or remove this one yourself."
    try:
        found = read_manifest(target)
        changes = request.differences(found["request"])
        splits = list(found["splits"])
    except DataError as error:
        raise DataError(f"{target} exists and holds no stored teacher. {remedy}") from error
    if changes:
        raise DataError(f"{target} holds something else: {changes}. {remedy}")
    for name in splits:
        TeacherStore.open(target / name, verify="hash")
    remove_leftover(target)
    return found


@contextmanager
def _staged(target: Path, request: TeacherRequest, *, first: bool) -> Iterator[Staging | None]:
    """Where the first rank writes; None on the others."""
    if not first:
        yield None
        return
    with open_staging(target, request, {}) as staging:
        staging.begin_corpus()
        yield staging


def _reader(speaker: Speaker, wanted: Wanted, vocab_size: int, seq_length: int) -> Reader:
    """The teacher with an ending that gives its most probable tokens."""
    from megatron_slm.evaluate.scoring import Reader
    from megatron_slm.parallel.gradients import unwrap
    from megatron_slm.parallel.vocab_scores import Vocabulary
    from megatron_slm.rollout.score import scores
    from megatron_slm.stages.top_tokens import TopTokens

    chunks, groups, device = speaker.built
    for chunk in map(unwrap, chunks):
        if chunk.post_process:
            chunk.ending = TopTokens(Vocabulary(vocab_size, wanted.temperature), wanted.top_k)
    return Reader(
        forward=partial(scores, chunks, groups=groups),
        multiple=groups.pp.size() if len(chunks) > 1 else 1,
        groups=groups,
        device=device,
        seq_length=seq_length,
        micro_batch_size=wanted.batch_size,
        eod_id=speaker.tokenizer.eod_id,
    )


def _split(
    reader: Reader, store: ExampleStore, staging: Staging | None, name: str, facts: Mapping[str, Any]
) -> dict[str, Any]:
    """One split, read by all ranks and written by the first; its index there. Collective."""
    from megatron_slm.stages.top_tokens import top_of

    writer = None
    if staging is not None:
        (staging.corpus / name).mkdir()
        own = {"tokenizer_hash": store.tokenizer_hash, "examples_digest": store.digest}
        writer = TeacherWriter(staging.corpus / name, {**facts, **own})
    for start in range(0, store.num_documents, BLOCK):
        numbers = range(start, min(start + BLOCK, store.num_documents))
        for values in reader.values([_document(store, number) for number in numbers], range(2 * facts["top_k"] + 1)):
            top = top_of(values)
            if not bool(top.logprobs.isfinite().all()):
                raise CheckpointError(
                    "A log-probability of the teacher is not finite: its weights hold NaN or infinity."
                )
            if writer is not None:
                writer.add(*(part.cpu().numpy() for part in top))
    if writer is None:
        return {}
    index = writer.finish()
    return {key: index[key] for key in ("num_documents", "num_labels", "covered")}


def _document(store: ExampleStore, number: int) -> Document:
    return Document(store.tokens(number).astype(np.int64), (store.weights(number) != 0).astype(np.float32))
