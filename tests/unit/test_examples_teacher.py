"""What a teacher says of examples, on disk and in a batch: every number at its label, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_slm.config.load import load
from megatron_slm.config.rules import violations
from megatron_slm.data.examples.rows import ExampleRows
from megatron_slm.data.examples.store import ExampleStore
from megatron_slm.data.examples.teacher import TeacherStore
from megatron_slm.data.examples.teacher_writer import TeacherWriter
from megatron_slm.errors import DataError
from megatron_slm.stages.config import DistillConfig
from megatron_slm.stages.stored_teacher import IDS, LOGPROBS, StoredTeacher
from tests.example_files import TEXT, compiled, pieces

WORDS, TOP_K = TEXT.split(), 4
ROWS = [
    {"prompt": " ".join(WORDS[at : at + 2 + at % 3]), "completion": " ".join(WORDS[at : at + 1 + at % 4])}
    for at in range(30)
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Examples, others of the same tokenizer, and what a made-up teacher says of the former."""
    root = tmp_path_factory.mktemp("teacher")
    pieces(root / "tokenizer")
    for name, rows in (("chats", ROWS), ("others", ROWS[:20])):
        (root / name).mkdir()
        compiled(root / name, rows, root / "tokenizer")
    written(root / "said" / "train", examples(root))
    return root


def examples(folder: Path, name: str = "chats") -> ExampleStore:
    return ExampleStore.open(folder / name / "out" / "train")


def said_of(store: ExampleStore, document: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Ids and log-probabilities that name document and label, so that none can stand for another."""
    labels = int(np.count_nonzero(store.weights(document)[1:]))
    ids = 100 * (document % 3) + (np.arange(labels)[:, None] * TOP_K + np.arange(TOP_K)) % 100
    shares = np.array([0.4, 0.3, 0.1, 0.05]) * (1 - np.arange(labels)[:, None] / 100) * (1 - document / 1000)
    return ids, np.log(shares), np.log1p(-shares.sum(1))


def written(
    directory: Path, store: ExampleStore, shard_numbers: int = 100, missing: int = 0, **facts: Any
) -> dict[str, Any]:
    directory.mkdir(parents=True)
    given = {
        "top_k": TOP_K,
        "temperature": 1.0,
        "vocab_size": store.vocab_size,
        "examples_digest": store.digest,
        "tokenizer_hash": store.tokenizer_hash,
    }
    writer = TeacherWriter(directory, {**given, **facts}, shard_numbers)
    for document in range(store.num_documents - missing):
        writer.add(*said_of(store, document))
    return writer.finish()


def rows_of(store: ExampleStore, **options: Any) -> ExampleRows:
    return ExampleRows(store, 128, **options)


def stored(folder: Path, rows: Any, trained: str = "assistant", **options: Any) -> StoredTeacher:
    own = DistillConfig(**{"distill_teacher": str(folder / "said"), "teacher_topk": TOP_K, **options})
    return StoredTeacher(own, {"train": {"chats": rows}, "valid": {}}, trained)


def test_what_is_written_is_read(folder: Path) -> None:
    store, said = examples(folder), TeacherStore.open(folder / "said" / "train", "hash")
    index = json.loads((folder / "said" / "train" / "index.json").read_text())
    assert len(index["shards"]) > 2
    covered = []
    for document in range(store.num_documents):
        ids, logprobs, rest = said_of(store, document)
        assert said.ids(document).tolist() == ids.tolist()
        assert said.logprobs(document) == pytest.approx(logprobs, rel=1e-6)
        assert said.rest(document) == pytest.approx(rest, rel=1e-6)
        covered += list(np.exp(said.logprobs(document).astype(float)).sum(axis=1))
    assert index["covered"] == pytest.approx(np.mean(covered), abs=1e-6)


@pytest.mark.parametrize("top_k", [TOP_K, 2])
@pytest.mark.parametrize("options", [{}, {"packed": False}, {"trained": "completion"}, {"part": (1, 2)}])
def test_every_label_that_counts_meets_its_teacher(folder: Path, options: dict[str, Any], top_k: int) -> None:
    store = examples(folder)
    rows = rows_of(store, **options)
    numbers = [1, 0] if rows.num_samples > 1 else [0]
    batch = {name: torch.cat([field, field[:1]]) for name, field in rows.batch(numbers).items()}  # one row of padding
    stored(folder, rows, teacher_topk=top_k).complete([batch], [[("chats", at) for at in numbers]])
    assert batch[IDS].dtype == torch.int64 and batch[LOGPROBS].dtype == torch.float32
    assert batch[IDS].shape == batch[LOGPROBS].shape == (len(numbers) + 1, 128, top_k)
    assert not batch[LOGPROBS][-1].any()
    for place, number in enumerate(numbers):
        start = 0
        for document in rows.documents(number):
            ids, logprobs, _ = said_of(store, document)
            slots = start + np.flatnonzero(store.weights(document)[1:])
            assert batch[IDS][place, slots].tolist() == ids[:, :top_k].tolist()
            assert batch[LOGPROBS][place, slots].numpy() == pytest.approx(logprobs[:, :top_k], rel=1e-6)
            start += len(store.tokens(document)) - 1
    counted = batch["loss_mask"][:-1] != 0
    assert counted.any() and bool((batch[LOGPROBS][:-1][counted] < 0).all())


def test_what_does_not_belong_together_is_refused(folder: Path, tmp_path: Path) -> None:
    rows, refusals = rows_of(examples(folder)), {}

    def refused(name: str, *given: Any, **options: Any) -> None:
        with pytest.raises(DataError) as error:
            stored(*given, **options)
        refusals[name] = str(error.value)

    refused("others", folder, rows_of(examples(folder, "others")))
    refused("train_on", folder, rows, "all")
    refused("text", folder, object())
    refused("temperature", folder, rows, distill_temperature=2.0)
    refused("top_k", folder, rows, teacher_topk=TOP_K + 1)
    refused("no split", folder, rows, distill_teacher=str(folder / "chats"))
    written(tmp_path / "said" / "train", examples(folder), tokenizer_hash="0123")
    refused("tokenizer", tmp_path, rows)
    written(tmp_path / "less" / "said" / "train", examples(folder), missing=1)
    refused("missing", tmp_path / "less", rows)
    said = {
        "missing": "29 documents",
        "others": "mslm data teacher",
        "train_on": "data.train_on = all",
        "text": "chats is text",
        "temperature": "--temperature 2.0",
        "top_k": "--top-k 5",
        "no split": "index.json",
        "tokenizer": "0123",
    }
    for name, words in said.items():
        assert words in refusals[name] and "\n" not in refusals[name], name


def test_damage_is_named(folder: Path, tmp_path: Path) -> None:
    directory = tmp_path / "train"
    index = written(directory, examples(folder))
    name, kept = index["shards"][1]["file"], (directory / index["shards"][1]["file"]).read_bytes()
    for content, words in ((kept[:-9], "bytes"), (kept[:700] + b"\x07" + kept[701:], "sha256")):
        (directory / name).write_bytes(content)
        with pytest.raises(DataError, match=f"{name}.*{words}.*data teacher"):
            TeacherStore.open(directory, "hash")
    (directory / name).write_bytes(kept)
    (directory / "index.json").write_text(json.dumps({**index, "num_labels": index["num_labels"] + 1}))
    with pytest.raises(DataError, match="promises"):
        TeacherStore.open(directory)
    (directory / "index.json").write_text(json.dumps({**index, "shards": index["shards"][:-1]}))
    with pytest.raises(DataError, match="promises"):
        TeacherStore.open(directory)
    (directory / "index.json").write_text("{}")
    with pytest.raises(DataError, match="teacher_version"):
        TeacherStore.open(directory)


def test_a_stored_teacher_is_named_and_reads_no_answers_of_the_student() -> None:
    def said(*options: str) -> str:
        return "\n".join(violations(load(None, ["stage=distill", *options]).config))

    assert "mslm data teacher" in said("distill.teacher_topk=4")
    named = ("distill.teacher_topk=4", "distill.distill_teacher=said")
    assert "distill" not in said(*named)
    assert "distill.distill_on_policy_fraction=0" in said(*named, "distill.distill_on_policy_fraction=0.5")
