"""Rules on mixtures are broken once each, alone; what they accept means what it says."""

from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path

import pytest

from megatron_slm.config import mixture_text
from megatron_slm.config.files import missing_inputs
from megatron_slm.config.load import load
from megatron_slm.config.rules import violations
from megatron_slm.errors import ConfigError

TWO = "data.sources=kjv=a,code=b"
AWARE = [TWO, "data.loss_aware_strength=1"]
MASK = "data.reset_attention_mask=true"


def broken(overrides: list[str]) -> list[str]:
    resolved = load(None, overrides)
    return violations(resolved.config, provenance=resolved.provenance)


ACCEPTED = [
    ["data.data_path=a"],
    [TWO],
    [TWO, "data.weights=kjv=0.7,code=.3", "data.phases=20000: kjv=1 code=1"],
    [TWO, "data.weights=kjv=1,code=0", "data.phases=9=code=1"],
    [TWO, "data.weights=kjv=1", "data.phases=9: code = 2e-1 kjv=3"],
    [TWO, "data.temperature=3"],
    [TWO, "data.phases=5: kjv=1"],
    [TWO, "data.weights=kjv=9.54e-7,code=1"],
    [*AWARE, "train.eval_interval=10"],
    ["data.data_path=a", "data.replay_run=runs/old", "data.replay_share=0.2"],
    [MASK, "data.length_schedule=0: 64,1000: 128,2000: 256"],
    [MASK, "data.length_schedule=500: 1"],
]


@pytest.mark.parametrize("overrides", ACCEPTED)
def test_accepted(overrides: list[str], tmp_path: Path) -> None:
    assert broken(overrides) == []
    saved = tmp_path / "config.yaml"
    saved.write_text(load(None, overrides).to_yaml())
    assert violations(load(saved).config) == [], "the saved configuration is accepted too"


REFUSED = [
    (["data.data_path=c", TWO], ("data.data_path = c (command line)", "data.sources = [", "exclude each other")),
    (["data.weights=kjv=1"], ("data.weights", "no sources")),
    (["data.phases=5: kjv=1"], ("data.phases", "no sources")),
    (["data.temperature=2"], ("data.temperature = 2.0", "no sources")),
    (["data.sources=kjv"], ("'kjv' is not NAME=DIR", "(command line)")),
    (["data.sources=kjv="], ("'kjv=' is not NAME=DIR",)),
    (["data.sources=1st=a"], ("'1st=a' is not NAME=DIR", "beginning with a letter")),
    (["data.sources=kjv=a,kjv=b"], ("'kjv' is named twice",)),
    (["data.sources=replay=a"], ("the name replay belongs to the samples of data.replay_run",)),
    (["data.sources=kjv=a,bible=./a"], ("kjv and bible are the same directory",)),
    ([TWO, "data.weights=kjv"], ("'kjv' is not NAME=NUMBER",)),
    ([TWO, "data.weights=kjv=-1,code=1"], ("'kjv=-1' is not NAME=NUMBER with a number of at least 0",)),
    ([TWO, "data.weights=kjv=nan,code=1"], ("'kjv=nan' is not NAME=NUMBER",)),
    ([TWO, "data.weights=kjv=1,kjv=2,code=1"], ("'kjv' is named twice",)),
    ([TWO, "data.weights=kjv=0,code=0"], ("data.weights", "weight above 0")),
    ([TWO, "data.weights=kjv=1"], ("code never has a weight above 0",)),
    ([TWO, "data.weights=kjv=1,cod=1,code=1"], ("no source cod. Did you mean code?",)),
    ([TWO, "data.weights=kjv=1,code=1,xyz=1"], ("no source xyz. The sources are kjv, code.",)),
    ([TWO, "data.phases=5: cod=1"], ("data.phases", "no source cod. Did you mean code?")),
    ([TWO, "data.phases=kjv=1"], ("'kjv=1' does not begin with a sample",)),
    ([TWO, "data.phases=5: kjv"], ("'kjv' is not NAME=NUMBER",)),
    ([TWO, "data.phases=5: kjv=0"], ("'5: kjv=0' gives no source a weight above 0",)),
    ([TWO, "data.phases=5:"], ("'5:' gives no source a weight above 0",)),
    ([TWO, "data.phases=0: kjv=1"], ("'0: kjv=1' begins at sample 0, where data.weights holds",)),
    ([TWO, "data.phases=9: kjv=1,9: code=1"], ("'9: code=1' must begin after sample 9",)),
    ([TWO, "data.temperature=2", "data.weights=kjv=1,code=1"], ("data.temperature = 2.0", "nothing to do")),
    (["data.replay_share=0.1"], ("data.replay_share = 0.1", "data.replay_run = null", "runs/NAME")),
    (
        [TWO, "data.weights=kjv=1e-9,code=1"],
        ("the share of kjv is below the smallest possible one, 1/1,048,576. Give it a weight of at least 9.54e-7",),
    ),
    ([TWO, "data.weights=kjv=1,code=1", "data.phases=5: kjv=1e999 code=1"], ("share of code is below", "9.54e+992")),
    (
        [TWO, "data.replay_run=r", "data.weights=kjv=1,code=1,replay=1"],
        ("share of replay is data.replay_share",),
    ),
    (["data.loss_aware_strength=1", "train.eval_interval=5"], ("at least two sources",)),
    (["data.sources=kjv=a", "data.loss_aware_strength=1", "train.eval_interval=5"], ("at least two sources",)),
    (AWARE, ("train.eval_interval = null", "held-out losses")),
    ([*AWARE, "train.eval_iters=0"], ("train.eval_iters = 0", "held-out losses")),
    ([MASK, "data.length_schedule=0: 100"], ("100 tokens do not divide", "64 or 128")),
    ([MASK, "data.length_schedule=0: 512"], ("512 tokens do not divide", "Nearest valid window: 256")),
    ([MASK, "data.length_schedule=0: none"], ("'0: none' is not 'SAMPLE: TOKENS'",)),
    ([MASK, "data.length_schedule=9: 64,3: 128"], ("'3: 128' must begin after sample 9",)),
    (["data.length_schedule=0: 64"], ("reset_attention_mask = false", "attention is cut")),
]


@pytest.mark.parametrize(("overrides", "words"), REFUSED)
def test_refused_in_one_text(overrides: list[str], words: tuple[str, ...]) -> None:
    found = broken(overrides)
    assert len(found) == 1, found
    assert all(word in found[0] for word in words), found[0]
    assert "\n" not in found[0]


def test_mappings_in_a_file_say_the_same(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(
        "data:\n  sources: {kjv: a, code: b}\n  weights: {kjv: 0.7, code: 0.3}\n"
        "  phases: {20000: kjv=0.5 code=0.5}\n  reset_attention_mask: true\n  length_schedule: {0: 64, 1000: 256}\n"
    )
    data = load(path).config.data
    assert violations(load(path).config) == []
    assert mixture_text.sources(data.sources) == {"kjv": "a", "code": "b"}
    assert mixture_text.weights(data.weights) == {"kjv": Fraction(7, 10), "code": Fraction(3, 10)}
    assert mixture_text.phases(data.phases) == [(20_000, {"kjv": Fraction(1, 2), "code": Fraction(1, 2)})]
    assert mixture_text.lengths(data.length_schedule) == [(0, 64), (1000, 256)]


@pytest.mark.parametrize("item", ["=1", "a=1=2", "a=1e9999", "a=", "a=١"])
def test_what_is_no_weight_is_refused(item: str) -> None:
    with pytest.raises(ConfigError, match="is not NAME=NUMBER"):
        mixture_text.weights([item])


def test_missing_inputs_of_every_source_are_named(tmp_path: Path) -> None:
    def missing(*overrides: str) -> list[str]:
        resolved = load(None, overrides)
        return missing_inputs(resolved.config, provenance=resolved.provenance)

    (tmp_path / "a" / "train").mkdir(parents=True)
    found = missing(f"data.sources=kjv={tmp_path}/a,code={tmp_path}/b")
    assert len(found) == 2 and "source kjv is no prepared corpus" in found[0]
    assert "source code: there is no such directory" in found[1]
    (tmp_path / "a" / "train" / "index.json").write_text('{"vocab_size": 500}')
    assert missing(f"data.sources=kjv={tmp_path}/a") == []
    (larger,) = missing(f"data.sources=kjv={tmp_path}/a", "model.vocab_size=400")
    assert "source kjv" in larger and "500 entries" in larger
    for name, index in {
        "b": {"tokenizer_hash": "x", "digest": "1"},
        "c": {"tokenizer_hash": "y", "digest": "1"},
    }.items():
        (tmp_path / name / "train").mkdir(parents=True)
        (tmp_path / name / "train" / "index.json").write_text(json.dumps({"vocab_size": 500, "eod_id": 0, **index}))
    other, twins = missing(f"data.sources=kjv={tmp_path}/b,code={tmp_path}/c")
    assert "kjv and code were made with different tokenizers" in other and "--tokenizer-model" in other
    assert "kjv and code hold the same tokens" in twins and "data.sources = [" in twins
    (gone,) = missing(f"data.data_path={tmp_path}/a", f"data.replay_run={tmp_path}/old")
    assert "data.replay_run" in gone and "no such directory" in gone
