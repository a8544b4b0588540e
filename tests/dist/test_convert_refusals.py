"""``mslm convert`` refuses what it cannot convert in one sentence, before anything is written."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tests.conversions import DECODER, converted, make, mslm, weights

pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("models") / "llama", "Llama", DECODER)


def changed_config(**values: Any) -> Callable[[Path], None]:
    def change(model: Path) -> None:
        config = json.loads((model / "config.json").read_text())
        (model / "config.json").write_text(json.dumps({**config, **values}))

    return change


def changed_weights(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    def rewrite(model: Path) -> None:
        tensors = weights(model)
        change(tensors)
        save_file(tensors, model / "model.safetensors")

    return rewrite


def truncated(model: Path) -> None:
    with (model / "model.safetensors").open("r+b") as stream:
        stream.truncate(10_000)


def as_pickle(model: Path) -> None:
    (model / "model.safetensors").rename(model / "pytorch_model.bin")


def indexed(**places: str) -> Callable[[Path], None]:
    def write(model: Path) -> None:
        (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))

    return write


NORM = "model.norm.weight"
DOWN = "model.layers.1.mlp.down_proj.weight"

BAD_MODELS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no config": (lambda model: (model / "config.json").unlink(), "has no config.json"),
    "no JSON": (lambda model: (model / "config.json").write_text("{"), "config.json cannot be read"),
    "architecture": (changed_config(model_type="falcon"), 'model_type = "falcon" is not supported'),
    "activation": (changed_config(hidden_act="gelu"), 'hidden_act = "gelu" is not supported; it must be silu'),
    "rope": (changed_config(rope_parameters={"rope_type": "yarn", "rope_theta": 1e4}), "rope_parameters.rope_type"),
    "rope key": (
        changed_config(rope_parameters={"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1]}),
        "rope_parameters.mrope_section",
    ),
    "half the biases": (changed_config(attention_bias=True), "attention_bias = true is not supported"),
    "quantised": (changed_config(quantization_config={"bits": 4}), "quantization_config"),
    "heads": (changed_config(num_key_value_heads=3), "num_key_value_heads = 3 is not supported"),
    "type of a value": (changed_config(num_hidden_layers="2"), 'num_hidden_layers = "2" is not supported'),
    "missing": (changed_weights(lambda tensors: tensors.pop(NORM)), f"lacks {NORM}"),
    "extra": (changed_weights(lambda tensors: tensors.update(x=torch.ones(1))), "has x, for which a llama"),
    "a layer too many": (changed_config(num_hidden_layers=1), r"has model\.layers\.1\..* \(and 8 more\)"),
    "shape": (changed_weights(lambda tensors: tensors.update({NORM: torch.ones(47)})), r"shape \[47\].*\[48\]"),
    "format": (changed_weights(lambda tensors: tensors.update({NORM: torch.ones(48).char()})), f"{NORM} is I8"),
    "two formats": (changed_weights(lambda tensors: tensors.update({DOWN: tensors[DOWN].half()})), "in one dtype"),
    "two matrices": (changed_config(tie_word_embeddings=True), "lm_head.weight is not equal to"),
    "truncated": (truncated, "model.safetensors is damaged or no safetensors file"),
    "pickle": (as_pickle, "pytorch_model.bin, a pickle .* save_pretrained writes safetensors"),
    "no weights": (lambda model: (model / "model.safetensors").unlink(), "holds neither model.safetensors nor"),
    "missing file": (indexed(**{NORM: "model-00001-of-00002.safetensors"}), "00002.safetensors is missing, which"),
    "file elsewhere": (indexed(**{NORM: "../model.safetensors"}), "which is no file beside it"),
    "index and file": (indexed(**{NORM: "model.safetensors"}), "do not agree on lm_head.weight"),
}


@pytest.fixture(scope="module")
def refusals(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[int, str]]:
    """What is said of each bad model; nothing may be left where the checkpoint would have been."""
    root, out = tmp_path_factory.mktemp("bad"), tmp_path_factory.mktemp("out")
    for name, (spoil, _) in BAD_MODELS.items():
        spoil(shutil.copytree(llama, root / name))
    said = mslm([["convert", "hf-import", str(root / name), "--output", str(out / "x")] for name in BAD_MODELS])
    assert list(out.iterdir()) == []
    return dict(zip(BAD_MODELS, said, strict=True))


@pytest.mark.parametrize("name", BAD_MODELS)
def test_a_bad_model_is_refused_in_one_sentence(name: str, refusals: dict[str, tuple[int, str]]) -> None:
    code, said = refusals[name]
    assert code == 2
    assert re.search(BAD_MODELS[name][1], said), said
    assert said.startswith("mslm: ") and said.count("\n") == 1, said


def test_a_full_disk_leaves_nothing(llama: Path, tmp_path: Path) -> None:
    checkpoint = llama.parent / "whole"
    commands = [
        ["convert", "hf-import", str(llama), "--output", str(checkpoint), "--no-logits"],
        ["convert", "hf-import", str(llama), "--output", str(tmp_path / "x"), "--no-logits"],
        ["convert", "hf-export", str(checkpoint), "--output", str(tmp_path / "x"), "--no-logits"],
    ]
    (whole, _), *refused = mslm(commands, {1: "full disk", 2: "full disk"})
    assert whole == 0
    for code, said in refused:
        assert code == 2 and "could not be written (File too large); nothing is left of it" in said, said
    assert list(tmp_path.iterdir()) == []


def test_a_bad_wish_is_refused_in_one_sentence(llama: Path, tmp_path: Path) -> None:
    """Of an export, and of any output that is there."""
    checkpoint, out = llama.parent / "checkpoint", tmp_path / "x"
    converted(["hf-import", llama, "--output", checkpoint, "--no-logits"])
    damaged = shutil.copytree(checkpoint, tmp_path / "damaged")
    with (damaged / "__0_0.distcp").open("r+b") as stream:
        stream.seek(2000)
        stream.write(b"\0\1\2\3")
    (tmp_path / "there").mkdir()
    before = sorted(tmp_path.rglob("*"))
    cases: list[tuple[list[Any], str]] = [
        (["hf-import", llama, "--output", tmp_path / "there"], "there exists"),
        (["hf-import", tmp_path / "nowhere", "--output", out], "has no config.json"),
        (["hf-import", llama, "--output", tmp_path / "iter_0000007"], "an import is of step 0"),
        (["hf-export", checkpoint, "--output", tmp_path / "there"], "there exists"),
        (["hf-export", llama, "--output", out], "holds no checkpoint"),
        (["hf-export", damaged, "--output", out], "is damaged"),
        (["hf-export", checkpoint, "--output", out, "--ema"], "holds no averaged weights"),
        (["hf-export", checkpoint, "--output", out, "--max-shard-size", "5 apples"], "write a number and KB"),
        (
            ["hf-export", checkpoint, "--output", out, "--model-type", "qwen2"],
            "model.add_qkv_bias is False, not True",
        ),
        (["hf-export", checkpoint, "--output", out, "--model-type", "falcon"], "llama, mistral, qwen2"),
    ]
    said = mslm([["convert", *map(str, command)] for command, _ in cases])
    for (code, text), (command, expected) in zip(said, cases, strict=True):
        assert code == 2 and expected in text, (command, text)
    assert sorted(tmp_path.rglob("*")) == before
