"""Compiled examples appear whole or not at all, say what was left out and why, whatever they were made with."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest

from megatron_slm.cli import main
from megatron_slm.data.examples import making
from megatron_slm.data.examples.compiling import compile_examples
from megatron_slm.data.examples.report import describe
from megatron_slm.data.examples.request import Options
from megatron_slm.data.examples.store import ExampleStore
from megatron_slm.data.examples.template import open_template
from megatron_slm.data.manifest import manifest_is_whole, read_manifest
from megatron_slm.data.tokenizer import Tokenizer
from megatron_slm.data.verify import verify
from megatron_slm.errors import DataError
from tests.example_files import TEXT, byte_level, compiled, pieces, write_rows

WORDS = TEXT.split()
ROWS = [{"prompt": f"Sort {i} 3 1", "completion": " ".join(sorted(f"{i}31"))} for i in range(40)]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tokenizer")
    pieces(directory)
    return directory


def opened(directory: Path, split: str = "train") -> ExampleStore:
    return ExampleStore.open(directory / "out" / split, verify="hash")


def test_what_is_written(tmp_path: Path, tokenizer: Path) -> None:
    manifest = compiled(tmp_path, ROWS, tokenizer, valid_share=0.3)
    again = read_manifest(tmp_path / "out")
    assert manifest_is_whole(again)
    assert again["template"]["spans"] == "marked" and again["template"]["end_ids"] == [2]
    assert again["splits"]["train"]["rows"] + again["splits"]["valid"]["rows"] == 40
    assert 4 < again["splits"]["valid"]["rows"] < 20
    assert again["splits"]["train"]["packing"]["efficiency"] > 0.5
    store = opened(tmp_path)
    saved = Tokenizer.open(tmp_path / "out" / "tokenizer", store.tokenizer_hash)
    assert open_template(None, saved).sha256 == manifest["template"]["sha256"] == store.template_sha256
    assert saved.decode(store.tokens(0).tolist()).startswith("User:\nSort")
    assert store.num_tokens == store.lengths.sum() == sum(again["splits"]["train"]["tokens_by_role"].values())
    assert not (tmp_path / ".out.preparing").exists()
    found = verify(tmp_path / "out")
    assert not found.problems and found.num_documents == 40
    (tmp_path / "out" / "tokenizer" / "chat_template.jinja").write_text("another")
    assert any("chat_template.jinja is damaged" in problem for problem in verify(tmp_path / "out").problems)


def test_an_equal_request_is_done_and_another_is_refused(tmp_path: Path, tokenizer: Path) -> None:
    assert not compiled(tmp_path, ROWS, tokenizer)["already_prepared"]
    assert compiled(tmp_path, ROWS, tokenizer)["already_prepared"]
    with pytest.raises(DataError, match="seq_length is 256 there, 128 was asked for"):
        compiled(tmp_path, ROWS, tokenizer, seq_length=128)
    (tmp_path / "out" / "train" / "shard-00000.arrow").write_bytes(b"x")
    with pytest.raises(DataError, match="shard-00000.arrow"):
        compiled(tmp_path, ROWS, tokenizer)


def test_formats_workers_chunks_and_shards_change_nothing(
    tmp_path: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    digest = compiled(tmp_path, ROWS, tokenizer)["splits"]["train"]["digest"]
    packed = tmp_path / "rows.jsonl.gz"
    packed.write_bytes(gzip.compress((tmp_path / "rows.jsonl").read_bytes()))
    table = tmp_path / "rows.parquet"
    pa.parquet.write_table(pa.Table.from_pylist(ROWS), table)
    monkeypatch.setattr(making, "CHUNK_ROWS", 7)
    options = Options(kind="chat", seq_length=256, valid_share=0.0, shard_tokens=100)
    for number, (path, workers) in enumerate([(packed, 1), (table, 2)]):
        output = tmp_path / f"other{number}"
        made = compile_examples([path], output, options, tokenizer_model=tokenizer, template="plain", workers=workers)
        assert made["splits"]["train"]["digest"] == digest
        store = ExampleStore.open(output / "train", verify="hash")
        assert len(store.index["shards"]) > 3
        assert all(
            np.array_equal(store.tokens(row), opened(tmp_path).tokens(row)) for row in range(store.num_documents)
        )


def test_conversations_in_parquet(tmp_path: Path, tokenizer: Path) -> None:
    said = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A", "weight": 0.5}]
    compiled(tmp_path, [{"messages": said}, {"messages": [*said, *said]}], tokenizer)
    pa.parquet.write_table(
        pa.Table.from_pylist([{"messages": said}, {"messages": [*said, *said]}]), tmp_path / "x.parquet"
    )
    options = Options(kind="chat", seq_length=256, valid_share=0.0)
    compile_examples([tmp_path / "x.parquet"], tmp_path / "x", options, tokenizer_model=tokenizer, template="plain")
    assert ExampleStore.open(tmp_path / "x" / "train").digest == opened(tmp_path).digest


def test_a_killed_compilation_goes_on(tmp_path: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = compiled(tmp_path, ROWS, tokenizer)["splits"]
    monkeypatch.setattr(making, "CHUNK_ROWS", 10)
    made: list[int] = []
    original = making.Maker.__call__

    def counting(self: making.Maker, chunk: making.RowChunk) -> Any:
        made.append(chunk.number)
        if len(made) == 3:
            raise KeyboardInterrupt
        return original(self, chunk)

    monkeypatch.setattr(making.Maker, "__call__", counting)
    options = Options(kind="chat", seq_length=256, valid_share=0.0)
    arguments: Any = ([tmp_path / "rows.jsonl"], tmp_path / "later", options)
    with pytest.raises(KeyboardInterrupt):
        compile_examples(*arguments, tokenizer_model=tokenizer, template="plain")
    assert not (tmp_path / "later").exists()
    assert compile_examples(*arguments, tokenizer_model=tokenizer, template="plain")["splits"] == whole
    assert made == [0, 1, 2, 2, 3], "finished chunks are not made again"


BAD: list[Any] = [
    "not json",
    {"prompt": "Q"},
    {"prompt": "Q", "completion": ""},
    {"prompt": "Q " * 300, "completion": "A"},
    {"prompt": "Q", "completion": "A " * 300},
    {"prompt": "spells </s>", "completion": "A"},
    {"messages": [{"role": "user", "content": "Q"}]},
]
REASONS = [
    "not JSON", "missing field", "empty completion", "prompt longer than the sequence", "longer than the sequence",
    "special token", "no answer",
]  # fmt: skip


@pytest.mark.parametrize("row", range(len(BAD)))
def test_a_bad_row_stops_with_file_and_line(tmp_path: Path, tokenizer: Path, row: int) -> None:
    with pytest.raises(DataError, match="rows.jsonl:2 .*--on-bad-row skip") as caught:
        compiled(tmp_path, [ROWS[0], BAD[row], ROWS[1]], tokenizer)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.glob("*out*")), "nothing is left"


def test_bad_rows_are_skipped_and_counted(tmp_path: Path, tokenizer: Path) -> None:
    manifest = compiled(tmp_path, [*BAD, *ROWS], tokenizer, on_bad_row="skip")
    assert manifest["left_out"] == dict.fromkeys(REASONS, 1)
    assert manifest["left_out_first"]["not JSON"][0]["row"].endswith("rows.jsonl:1")
    assert manifest["sources"][0]["rows"] == 47 and manifest["sources"][0]["kept"] == 40
    shown = describe(tmp_path / "out")
    assert "left out: 7 of 47 rows" in shown and "1 empty completion" in shown
    with pytest.raises(DataError, match="No row is left to train on"):
        compiled(tmp_path / "out" / "train", BAD, tokenizer, on_bad_row="skip")


def test_a_long_answer_may_be_cut(tmp_path: Path, tokenizer: Path) -> None:
    manifest = compiled(tmp_path, [BAD[4], *ROWS], tokenizer, too_long="truncate")
    assert manifest["truncated"] == 1 and opened(tmp_path).longest == 256
    assert "truncated: 1 rows" in describe(tmp_path / "out")


def test_equal_and_similar_rows_come_once(tmp_path: Path, tokenizer: Path) -> None:
    long = " ".join(WORDS[100:180])
    rows = [{"prompt": long, "completion": "A"}, *ROWS, {"prompt": long + " more", "completion": "A"}, ROWS[3]]
    assert compiled(tmp_path, rows, tokenizer, seq_length=512)["left_out"] == {}
    for duplicates, expected in (("exact", {"duplicate": 1}), ("near", {"duplicate": 1, "near duplicate": 1})):
        folder = tmp_path / duplicates
        folder.mkdir()
        found = compiled(folder, rows, tokenizer, seq_length=512, duplicates=duplicates)
        assert found["left_out"] == expected
    assert found["left_out_first"]["duplicate"][0]["detail"].endswith("rows.jsonl:5")


def test_rows_of_one_opening_are_in_one_split_and_what_leaks_is_said(tmp_path: Path, tokenizer: Path) -> None:
    rows = [{"prompt": f"Q{i // 4}", "completion": f"A{i}"} for i in range(80)]
    compiled(tmp_path, rows, tokenizer, valid_share=0.4)
    train, valid = ({int(number) // 4 for number in opened(tmp_path, split).numbers} for split in ("train", "valid"))
    assert train and valid and not train & valid
    same = " ".join(WORDS[200:240])
    leaking = [{"prompt": f"{i}", "completion": same} for i in range(30)]
    (tmp_path / "leaks").mkdir()
    manifest = compiled(tmp_path / "leaks", leaking, tokenizer, valid_share=0.4)
    assert manifest["leakage"]["train_rows_like_valid"] == manifest["splits"]["train"]["rows"]
    assert "leakage:" in describe(tmp_path / "leaks" / "out")


def test_what_an_evaluation_asks_is_left_out(tmp_path: Path, tokenizer: Path) -> None:
    said = " ".join(WORDS[300:340])
    evaluation = write_rows(
        tmp_path / "eval.jsonl",
        [
            {"prompt": ROWS[0]["prompt"], "answer": 1},
            {"messages": [{"role": "user", "content": said}]},
            {"text": "x y"},
        ],
    )
    rows = [*ROWS, {"prompt": "say it", "completion": said}]
    manifest = compiled(tmp_path, rows, tokenizer, check_against=[evaluation])
    assert manifest["left_out"] == {"leak:eval.jsonl": 2}
    write_rows(evaluation, [{"nothing": 1}])
    with pytest.raises(DataError, match="eval.jsonl:1"):
        compile_examples(
            [tmp_path / "rows.jsonl"],
            tmp_path / "other",
            Options(kind="chat", seq_length=256),
            tokenizer_model=tokenizer,
            template="plain",
            check_against=[evaluation],
        )


def test_preferences_and_prompts(tmp_path: Path, tokenizer: Path) -> None:
    pairs = [{"prompt": f"Q{i}", "chosen": "yes", "rejected": "no", "margin": 0.5 * i} for i in range(5)]
    compiled(
        tmp_path,
        [*pairs, {**pairs[0], "chosen": "x " * 90, "rejected": "y " * 90}],
        tokenizer,
        kind="preference",
        on_bad_row="skip",
    )
    store = opened(tmp_path)
    assert store.kind == "preference" and store.num_documents == 10
    assert store.margins[::2].tolist() == store.margins[1::2].tolist() == [0.0, 0.5, 1.0, 1.5, 2.0]
    (tmp_path / "prompts").mkdir()
    asked = [
        {"prompt": "Q", "answer": {"any": [1]}, "verifier": "exact"},
        {"prompt": [{"role": "user", "content": "P"}]},
    ]
    compiled(tmp_path / "prompts", asked, tokenizer, kind="prompt")
    prompts = opened(tmp_path / "prompts")
    assert prompts.fields(0) == {"answer": {"any": [1]}, "verifier": "exact"} and prompts.fields(1) == {}
    assert not prompts.weights(0).any()
    shown = describe(tmp_path / "prompts" / "out", first=1)
    assert shown.endswith("User:\nQ\nAssistant:\n\n--- with {'answer': {'any': [1]}, 'verifier': 'exact'}")


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    byte_level(tmp_path)
    inputs = write_rows(tmp_path / "rows.jsonl", ROWS)
    typed = f"data examples {inputs} --output {tmp_path}/out --kind chat --tokenizer-model {tmp_path} --seq-length 64"
    assert main([*typed.split(), "--workers", "1"]) == 2
    assert "--template" in capsys.readouterr().err
    assert main([*typed.split(), "--workers", "1", "--template", "chatml", "--valid-share", "0"]) == 0
    assert json.loads(capsys.readouterr().out)["template"]["name"] == "chatml"
    assert main(["data", "show", f"{tmp_path}/out", "--first", "1"]) == 0
    shown = capsys.readouterr().out
    assert "<|im_start|>assistant\n[[0 1 3<|im_end|>]]" in shown
    assert "100.0% trained" in shown
    assert main(["data", "show", f"{tmp_path}/out", "--split", "valid"]) == 2
    assert "\x1b[1;32m" in describe(tmp_path / "out", colour=True)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"seq_length": 1}, "--seq-length"),
        ({"valid_share": 1.0}, "--valid-share"),
        ({"kind": "text"}, "--kind"),
        ({"leak_share": 2.0}, "--leak-share"),
        ({"rationale_weight": -1.0}, "--rationale-weight"),
    ],
)
def test_options_out_of_range(options: dict[str, Any], said: str) -> None:
    with pytest.raises(DataError, match=said):
        Options(**{"kind": "chat", "seq_length": 8, **options})
