"""The verbs on data as a person types them: prepare, stats, verify, export."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import sysconfig
from pathlib import Path

import pytest

from megatron_slm.cli import VERBS, main
from megatron_slm.data.corpus import Corpus
from megatron_slm.data.indexed import read
from megatron_slm.data.manifest import manifest_is_whole, read_manifest
from megatron_slm.data.prepare import prepare

WORDS = ["corpus", "token", "shard", "index", "digest", "licence", "mixture", "order"]
TEXTS = [
    f"the {first} of document {number} has a {second}" for number in range(20) for first in WORDS for second in WORDS
]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("data")
    (directory / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    prepare([directory / "text.jsonl"], directory / "corpus", vocab_size=400, shard_tokens=4000)
    return directory / "corpus"


@pytest.fixture
def corpus(prepared: Path, tmp_path: Path) -> Path:
    shutil.copytree(prepared, tmp_path / "corpus")
    return tmp_path / "corpus"


def test_verify_counts_what_it_has_read(corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "verify", str(corpus)]) == 0
    said = capsys.readouterr().out
    splits = read_manifest(corpus)["splits"]
    tokens = sum(split["num_tokens"] for split in splits.values())
    assert said.startswith(
        f"ok: {corpus}: 2 splits, {len(list(corpus.glob('*/shard-*')))} shards, {len(TEXTS):,} documents"
    )
    assert f"{tokens:,} tokens" in said


def test_verify_finds_a_flipped_bit_in_any_file_but_the_card(corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = sorted(path for path in corpus.rglob("*") if path.is_file() and path.name != "card.md")
    assert len(files) > 8
    for path in files:
        content = path.read_bytes()
        # Inside a number or a name, so that JSON stays JSON.
        place = max(content.rfind(b"1"), content.rfind(b"a")) if path.suffix == ".json" else len(content) // 2
        path.write_bytes(content[:place] + bytes([content[place] ^ 2]) + content[place + 1 :])
        assert main(["data", "verify", str(corpus)]) == 2, path
        said = capsys.readouterr().err
        assert str(path) in said and "Traceback" not in said
        path.write_bytes(content)
    assert main(["data", "verify", str(corpus)]) == 0


def test_verify_lists_every_problem(corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (corpus / "train" / "shard-00001.arrow").unlink()
    (corpus / "train" / "shard-00000.arrow").rename(corpus / "train" / "shard-00009.arrow")
    shard = corpus / "valid" / "shard-00000.arrow"
    shard.write_bytes(shard.read_bytes()[:-8])
    (corpus / "tokenizer" / "tokenizer.model").unlink()
    assert main(["data", "verify", str(corpus)]) == 2
    said = capsys.readouterr().err
    for words in (
        "train/shard-00001.arrow is missing",
        "train/shard-00000.arrow is missing",
        "train/shard-00009.arrow is not in the index",
        "valid/shard-00000.arrow has",
        "tokenizer/tokenizer.model: No such file",
        "holds no tokenizer",
    ):
        assert words in said, said
    assert said.splitlines()[-1] == f"6 problems in {corpus}"


def test_verify_finds_documents_that_were_joined(corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An index that was changed together with the manifest still has to count the documents that are there."""
    index = corpus / "train" / "index.json"
    content = json.loads(index.read_text())
    index.write_text(json.dumps({**content, "num_documents": content["num_documents"] - 1}))
    assert main(["data", "verify", str(corpus)]) == 2
    said = capsys.readouterr().err
    assert "ends of documents, but its index promises" in said and "but the manifest promises" in said


def test_verify_needs_a_manifest(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "verify", str(tmp_path)]) == 2
    assert "Give the directory that `mslm data prepare` wrote" in capsys.readouterr().err
    (tmp_path / "manifest.json").write_text("{}")
    assert main(["data", "verify", str(tmp_path)]) == 2
    assert "names no request and no splits" in capsys.readouterr().err


def test_export_and_prepare_are_inverse(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prefix = tmp_path / "exported"
    assert main(["data", "export", str(corpus), "--split", "train", "--output", str(prefix)]) == 0
    train = Corpus.open(corpus / "train")
    assert f"{train.num_documents:,} documents, {train.num_tokens:,} tokens" in capsys.readouterr().out
    assert sum(len(document) for document in read(prefix)) == train.num_tokens
    back = ["data", "prepare", str(prefix), "--output", str(tmp_path / "back"), "--split", "0"]
    assert main(back) == 2
    assert "Name it with --tokenizer-model" in capsys.readouterr().err
    back += ["--tokenizer-model", str(corpus / "tokenizer")]
    assert main([*back, "--min-chars", "5"]) == 2
    assert "which no filter of text can judge" in capsys.readouterr().err
    assert main(back) == 0
    assert Corpus.open(tmp_path / "back" / "train", verify="hash").digest == train.digest
    assert main(["data", "export", str(corpus), "--output", str(prefix)]) == 2
    assert "exists" in capsys.readouterr().err


def test_several_formats_in_one_go_with_every_filter(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tree = tmp_path / "tree"
    tree.mkdir()
    for name in ("ast.py", "bisect.py"):
        shutil.copy(Path(sysconfig.get_path("stdlib")) / name, tree)
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in [*TEXTS, TEXTS[0]]))
    leak = "a sentence of fourteen words that the evaluation holds must not be in training data"
    (tmp_path / "prose.txt").write_text(f"Write to somebody@example.com about it.\n\n{leak}\n\nno\n")
    (tmp_path / "eval.jsonl").write_text(json.dumps({"question": leak}) + "\n")
    inputs = [str(tmp_path / name) for name in ("text.jsonl", "tree", "prose.txt")]
    options = "--vocab-size 500 --dedup exact --min-chars 5 --max-chars 100000 --scrub-pii --ngram 10 --licence CC0-1.0"
    output = ["--output", str(tmp_path / "corpus"), "--split", "0"]
    output += ["--decontaminate", str(tmp_path / "eval.jsonl"), "--decontaminate-key", "question"]
    assert main(["data", "prepare", *inputs, *output, *options.split()]) == 0
    manifest = json.loads(capsys.readouterr().out)
    assert manifest["dropped"] == {"exact duplicate": 1, "leak:eval.jsonl": 1, "short": 1}
    assert manifest["scrubbed"] == {"EMAIL": 1}
    counts = [(source["documents"], source["kept"], source["licence"]) for source in manifest["sources"]]
    assert counts == [(len(TEXTS) + 1, len(TEXTS), "CC0-1.0"), (2, 2, "CC0-1.0"), (3, 1, "CC0-1.0")]
    assert Corpus.open(tmp_path / "corpus" / "train").sources == manifest["sources"]
    assert manifest_is_whole(read_manifest(tmp_path / "corpus"))
    card = (tmp_path / "corpus" / "card.md").read_text()
    assert "CC0-1.0" in card and "--decontaminate-key question" in card
    assert main(["data", "verify", str(tmp_path / "corpus")]) == 0


def test_the_examples_of_the_data_verbs_work_as_typed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    text = "\n".join(
        json.dumps({"text": block})
        for block in (Path(sysconfig.get_path("stdlib")) / "ast.py").read_text().split("\n\n") * 2
    )
    Path("books.jsonl").write_text(text)
    chats = [json.dumps({"prompt": f"Question {number}?", "completion": "Answer."}) for number in range(8)]
    Path("chats.jsonl").write_text("\n".join(chats))
    # A teacher is a trained run: tests/dist/test_stored_teacher.py.
    verbs = [name for name in VERBS if name.startswith("data ") and name != "data teacher"]
    assert verbs[0] == "data prepare", "the others read what it writes"
    for name in verbs:
        assert main([*name.split(), "--help"]) == 0
        example = re.search(rf"^  mslm ({name} .*)$", capsys.readouterr().out, re.MULTILINE)
        assert example is not None
        assert main(shlex.split(example[1])) == 0, example[1]
        assert capsys.readouterr().out
