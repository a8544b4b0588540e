"""The data of a run, opened from its configuration: one corpus, several, and those of another run."""

from __future__ import annotations

import argparse
import ast
import inspect as source
import json
import shutil
from fractions import Fraction
from pathlib import Path
from types import ModuleType

import pytest

from megatron_slm.cli import main
from megatron_slm.config.load import load
from megatron_slm.config.run_config import RunConfig
from megatron_slm.data.cursor import Cursor
from megatron_slm.data.prepare import prepare
from megatron_slm.data.replay import ReplayedSamples
from megatron_slm.errors import DataError
from megatron_slm.run_data import identity, open_data
from megatron_slm.train import manifest
from megatron_slm.train.saved_state import STATE_FILE, SavedState

LENGTH = 32


def written(directory: Path, module: ModuleType, tokenizer: Path | None = None) -> Path:
    text = directory.with_suffix(".jsonl")
    blocks = [block for block in source.getsource(module).split("\n\n") if block.strip()]
    text.write_text("".join(json.dumps({"text": block}) + "\n" for block in blocks))
    if tokenizer is None:
        prepare([text], directory, vocab_size=500, split=0.1)
    else:
        prepare([text], directory, tokenizer_model=tokenizer, split=0.1)
    return directory


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    parent = tmp_path_factory.mktemp("corpora")
    first = written(parent / "argparse", argparse)
    second = written(parent / "ast", ast, first / "tokenizer" / "tokenizer.model")
    return {"argparse": first, "ast": second, "other": written(parent / "other", ast)}


def config_of(*overrides: str, seq_length: int = LENGTH) -> RunConfig:
    return load(None, [f"model.seq_length={seq_length}", *overrides]).config


def mixture_of(corpora: dict[str, Path], *overrides: str) -> RunConfig:
    sources = f"data.sources=doc={corpora['argparse']},code={corpora['ast']}"
    return config_of(sources, *overrides)


def test_one_corpus_is_a_source_named_as_its_directory(corpora: dict[str, Path]) -> None:
    data = open_data(config_of(f"data.data_path={corpora['ast']}"))
    assert list(data.train) == list(data.valid) == [one.name for one in data.order.sources] == ["ast"]
    assert open_data(config_of(f"data.data_path={corpora['ast']}", "train.eval_iters=0")).valid == {}


def test_a_mixture_shares_by_size_by_temperature_or_by_weight(corpora: dict[str, Path]) -> None:
    data = open_data(mixture_of(corpora))
    tokens = {name: corpus.num_tokens for name, corpus in data.valid.items()}
    assert set(tokens) == {"doc", "code"} == set(data.train)
    by_size = data.order.phases[0].shares
    assert float(by_size["doc"]) == pytest.approx(
        open_data(config_of(f"data.data_path={corpora['argparse']}")).order.sources[0].order.num_samples
        / sum(one.order.num_samples for one in data.order.sources),
        abs=0.01,
    )
    flat = open_data(mixture_of(corpora, "data.temperature=1e6")).order.phases[0].shares
    assert float(flat["doc"]) == pytest.approx(0.5, abs=1e-3)
    weighted = open_data(mixture_of(corpora, "data.weights=doc=0.7,code=0.3")).order.phases[0].shares
    assert weighted == {"doc": Fraction(7, 10), "code": Fraction(3, 10)}


def test_identity_leaves_sources_and_shares_to_the_cursor(corpora: dict[str, Path]) -> None:
    def of(*overrides: str) -> dict[str, object]:
        config = mixture_of(corpora, *overrides)
        return dict(identity(config, open_data(config))["data"])

    assert of("data.weights=doc=0.7,code=0.3") == of("data.weights=doc=0.5,code=0.5", "data.phases=9: doc=1")
    assert of("data.weights=doc=1,code=1") == of("data.weights=doc=1", "data.phases=9: code=1")
    assert of() != of("data.reset_attention_mask=true")
    one = config_of(f"data.data_path={corpora['argparse']}")
    assert identity(one, open_data(one))["data"] == of("data.weights=doc=1", "data.phases=9: code=1")


def test_another_tokenizer_among_the_sources_is_refused_by_both_names(corpora: dict[str, Path]) -> None:
    with pytest.raises(DataError, match=r"argparse/train and .*other/train were made with different tokenizers"):
        open_data(config_of(f"data.sources=a={corpora['argparse']},b={corpora['other']}"))


def test_the_same_tokens_twice_are_refused(corpora: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(corpora["ast"], tmp_path / "copy")
    with pytest.raises(DataError, match="The sources a and b hold the same tokens"):
        open_data(config_of(f"data.sources=a={corpora['ast']},b={tmp_path / 'copy'}"))


def checkpoint_of(directory: Path, overrides: list[str], cursor: Cursor) -> Path:
    """What a checkpoint of a run holds beside its tensors."""
    path = directory / "checkpoints" / "iter_0000002"
    path.mkdir(parents=True)
    state = SavedState(
        step=2,
        consumed_samples=cursor.consumed_samples,
        cursor=cursor.to_dict(),
        layout={},
        params_dtype="float32",
        tokenizer_hash=cursor.tokenizer_hash,
    )
    for name in manifest.REQUIRED:
        (path / name).touch()
    (path / STATE_FILE).write_text(state.to_json())
    (path / "config.yaml").write_text(load(None, overrides).to_yaml())
    manifest.seal(path, step=2, identity="")
    return path


def test_replay_reads_what_the_other_run_has_trained_on(corpora: dict[str, Path], tmp_path: Path) -> None:
    earlier = [f"model.seq_length={LENGTH}", f"data.sources=doc={corpora['argparse']},code={corpora['ast']}"]
    before = open_data(load(None, earlier).config)
    cursor = Cursor.start(before.order, before.tokenizer.hash).advance(20).skip(4).advance(16)
    replayed = checkpoint_of(tmp_path / "old", earlier, cursor)
    config = config_of(f"data.data_path={corpora['ast']}", f"data.replay_run={replayed}", "data.replay_share=0.25")
    data = open_data(config)
    assert data.order.phases[0].shares == {"ast": Fraction(3, 4), "replay": Fraction(1, 4)}
    samples = data.train["replay"]
    assert isinstance(samples, ReplayedSamples) and samples.num_samples == 36
    assert list(data.valid) == ["ast"], "nothing new is held out"
    trained = {
        tuple(before.train[found.source].sample(found.index, LENGTH).tolist())
        for found in map(before.order.sample_id, [*range(20), *range(24, 40)])
    }
    read = [found for found in map(data.order.sample_id, range(144)) if found.source == "replay"]
    assert {tuple(samples.sample(found.index, LENGTH).tolist()) for found in read} == trained
    assert len(read) == len({found.index for found in read}) == 36

    with pytest.raises(DataError, match=f"samples of {LENGTH} tokens, this run of 64"):
        open_data(config_of(f"data.data_path={corpora['ast']}", f"data.replay_run={replayed}", seq_length=64))
    with pytest.raises(DataError, match="another tokenizer"):
        open_data(config_of(f"data.data_path={corpora['other']}", f"data.replay_run={replayed}"))
    with pytest.raises(DataError, match="cannot be replayed: .*holds no checkpoint"):
        open_data(config_of(f"data.data_path={corpora['ast']}", f"data.replay_run={tmp_path}"))


def test_a_corpus_of_the_replayed_run_that_changed_or_moved_is_refused(
    corpora: dict[str, Path], tmp_path: Path
) -> None:
    moving = tmp_path / "moving"
    shutil.copytree(corpora["argparse"], moving)
    earlier = [f"model.seq_length={LENGTH}", f"data.data_path={moving}"]
    before = open_data(load(None, earlier).config)
    replayed = checkpoint_of(tmp_path / "old", earlier, Cursor.start(before.order, before.tokenizer.hash).advance(8))
    config = config_of(f"data.data_path={corpora['ast']}", f"data.replay_run={replayed}")
    assert "replay" in open_data(config).train
    shutil.copytree(moving, tmp_path / "elsewhere")
    shutil.rmtree(moving)
    noted = replayed.parent.parent / "data.json"
    noted.write_text(json.dumps({"sources": {"moving": {"directory": str(tmp_path / "elsewhere")}}}))
    assert "replay" in open_data(config).train
    noted.unlink()
    with pytest.raises(DataError, match=r"data.replay_run=.* cannot be replayed: .*moving.* does not exist"):
        open_data(config)
    shutil.copytree(corpora["other"], moving)
    with pytest.raises(DataError, match=r"cannot be replayed: (?s:.*)dataset_digest"):
        open_data(config)


def test_inspect_shows_source_shares_and_text(
    corpora: dict[str, Path], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    sources = f"data.sources=doc={corpora['argparse']},code={corpora['ast']}"
    more = [sources, "data.weights=doc=0.7,code=0.3", "data.phases=10: code=1", f"model.seq_length={LENGTH}"]
    data = open_data(load(None, more).config)
    for position in (0, 9, 12):
        assert main(["data", "inspect", *more, "--index", str(position)]) == 0
        lines = capsys.readouterr().out.split("\n")
        found = data.order.sample_id(position)
        assert lines[0].startswith(
            f"train position {position}: source {found.source}, epoch 0, sample {found.index} of"
        )
        corpus = data.valid[found.source].directory.parent
        assert any(line.startswith(f"tokens {found.index * LENGTH}..") for line in lines), corpus
    assert "shares from sample 10 on" in lines[1]
    assert lines[2].startswith("  doc: share 0, 7 samples so far, 58.3333%")
    assert lines[3].startswith("  code: share 1, 5 samples so far, 41.6667%")
    assert main(["data", "inspect", *more, "--split", "valid"]) == 2
    cursor = Cursor.start(data.order, data.tokenizer.hash).advance(12)
    replayed = checkpoint_of(tmp_path / "old", more, cursor)
    own = [f"data.data_path={corpora['ast']}", f"data.replay_run={replayed}", "data.replay_share=0.999"]
    assert main(["data", "inspect", *own, f"model.seq_length={LENGTH}", "--index", "0"]) == 0
    text = capsys.readouterr().out
    assert "source replay" in text and "replayed from position" in text


def test_inspect_shows_what_the_run_has_read_under_shares_it_decided_itself(
    corpora: dict[str, Path], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    sources = f"data.sources=doc={corpora['argparse']},code={corpora['ast']}"
    aware = ["data.loss_aware_strength=1", "train.eval_interval=2", f"log.runs_dir={tmp_path}", "name=aware"]
    options = [sources, "data.weights=doc=0.7,code=0.3", f"model.seq_length={LENGTH}", *aware]
    data = open_data(load(None, options).config)
    start = Cursor.start(data.order, data.tokenizer.hash).advance(10)
    moved = start.with_phase({"doc": Fraction(1, 10), "code": Fraction(9, 10)}).advance(10)
    position = next(at for at in range(10, 20) if moved.order.sample_id(at) != data.order.sample_id(at))
    assert main(["data", "inspect", *options, "--index", str(position)]) == 0
    told = capsys.readouterr()
    assert f"source {data.order.sample_id(position).source}," in told.out and "not before the 0 that" in told.err
    checkpoint = checkpoint_of(tmp_path / "aware", options, moved)
    (checkpoint.parent / "latest_checkpointed_iteration.txt").write_text("2")
    assert main(["data", "inspect", *options, "--index", str(position)]) == 0
    told = capsys.readouterr()
    assert f"source {moved.order.sample_id(position).source}," in told.out and not told.err
    assert "shares from sample 10 on, by held-out loss" in told.out
    assert main(["data", "inspect", *options, "--index", "20"]) == 0
    assert "sample 20 is not before the 20" in capsys.readouterr().err
    assert main(["data", "inspect", *options, "train.seed=5", "--index", "3"]) == 0
    assert "shown as configured" in capsys.readouterr().err
