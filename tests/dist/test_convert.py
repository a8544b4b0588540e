"""``mslm convert``: Hugging Face models of every family become checkpoints and back, with the same bits and logits."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
from safetensors.torch import load_file, save_file
from tokenizers import decoders, models, pre_tokenizers, trainers

from tests import runs
from tests.conversions import DECODER, FAMILIES, converted, make, mslm, report, weights

transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def families(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``NAME`` as transformers saves it, ``NAME-checkpoint`` imported from it, ``NAME-again`` exported from that.

    And ``sharded`` and ``half``, exported otherwise; ``gpt2-hub`` and ``llama-twice``, written as others do. All of it
    is one process, because transformers takes seconds to import.
    """
    root = tmp_path_factory.mktemp("families")
    commands: list[list[Any]] = []
    for family, (name, config) in FAMILIES.items():
        if "bfloat16" in family:
            make(root / family, name, config, torch.bfloat16, max_shard_size="30KB")
        else:
            make(root / family, name, config)
        commands.append(["hf-import", root / family, "--output", root / f"{family}-checkpoint"])
        commands.append(["hf-export", root / f"{family}-checkpoint", "--output", root / f"{family}-again"])
    commands += [
        ["hf-export", root / "llama-checkpoint", "--output", root / "sharded", "--max-shard-size", "60KB"],
        ["hf-export", root / "qwen2-checkpoint", "--output", root / "half", "--dtype", "bfloat16"],
    ]
    for path in (as_on_the_hub(root), stored_twice(root), with_tokenizer(root)):
        commands.append(["hf-import", path, "--output", f"{path}-checkpoint"])
    commands.append(["hf-export", root / "llama-tokenizer-checkpoint", "--output", root / "llama-tokenizer-again"])
    converted(*commands)
    return root


def with_tokenizer(root: Path) -> Path:
    """Llama with what a tokenizer of the hub consists of."""
    path = shutil.copytree(root / "llama", root / "llama-tokenizer")
    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(vocab_size=90, special_tokens=special, show_progress=False)
    made.train_from_iterator(["abcdefgh ijklm"], trainer)
    made.save(str(path / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>"}
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    (path / "chat_template.jinja").write_text("{{ messages[0].content }}")
    return path


def as_on_the_hub(root: Path) -> Path:
    """GPT-2 without the first word of its names, and with masks."""
    path = shutil.copytree(root / "gpt2", root / "gpt2-hub")
    tensors = {name.removeprefix("transformer."): tensor for name, tensor in weights(path).items()}
    tensors["h.0.attn.bias"] = torch.ones(1, 1, 64, 64)
    save_file(tensors, path / "model.safetensors")
    return path


def stored_twice(root: Path) -> Path:
    """A tied matrix under both names, and the keys of transformers 4."""
    path = shutil.copytree(root / "llama-tied-bfloat16", root / "llama-twice")
    tensors = weights(path)
    for file in path.glob("model*"):
        file.unlink()
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, path / "model.safetensors")
    config = json.loads((path / "config.json").read_text())
    config |= {"rope_theta": 10000.0, "rope_scaling": None, "torch_dtype": config.pop("dtype")}
    del config["rope_parameters"]
    (path / "config.json").write_text(json.dumps(config))
    return path


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_goes_both_ways(family: str, families: Path) -> None:
    model, again = families / family, families / f"{family}-again"
    there = weights(model)
    assert runs.differences(there, weights(again)) == []
    for made in ("checkpoint", "again"):
        found = report(families / f"{family}-{made}")
        assert found["summary"]["worst_relative_logit_error"] < 1e-5, "the bound that is promised is ten times this"
        assert {row["name"] for row in found["tensors"]} == set(there)
        assert all(row["equal"] for row in found["tensors"])
        assert found["padding"] == 28, "100 entries are padded to 128"
        assert "| yes |" in (families / f"{family}-{made}" / "conversion.md").read_text()
    first, second = (transformers.AutoConfig.from_pretrained(path).to_dict() for path in (model, again))
    told = {"max_position_embeddings": 64, "sliding_window": None} if family == "mistral-window" else {}
    for key in set(first) - {"architectures", "_name_or_path", "transformers_version", "head_dim", "n_inner"}:
        assert second[key] == told.get(key, first[key]), key


def test_files_are_those_that_transformers_writes(families: Path) -> None:
    single = families / "llama-again" / "model.safetensors"
    assert single.read_bytes() == (families / "llama" / "model.safetensors").read_bytes()


def test_a_window_bounds_the_positions(families: Path) -> None:
    """Beyond the window this program would compute something else than transformers."""
    assert "max_position_embeddings: 64\n" in (families / "mistral-window-checkpoint" / "config.yaml").read_text()
    assert any("sliding_window is 64" in note for note in report(families / "mistral-window-checkpoint")["notes"])


def test_shards_hold_consecutive_layers_and_are_listed(families: Path, tmp_path: Path) -> None:
    out = families / "sharded"
    index = json.loads((out / "model.safetensors.index.json").read_text())
    files = {path.name: set(load_file(path)) for path in out.glob("*.safetensors")}
    assert len(files) > 2 and max(path.stat().st_size for path in out.glob("*.safetensors")) < 70_000
    assert index["weight_map"] == {name: file for file, inside in files.items() for name in inside}
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in weights(out).values())
    layers = [[file for file, names in files.items() if any(f"layers.{n}." in name for name in names)] for n in (0, 1)]
    assert max(layers[0]) <= min(layers[1])
    assert runs.differences(weights(families / "llama"), weights(out)) == []
    converted(["hf-import", out, "--output", tmp_path / "back", "--no-logits"])


def test_a_dtype_rounds_and_says_so(families: Path) -> None:
    out = families / "half"
    rounded = {name: tensor.bfloat16() for name, tensor in weights(families / "qwen2").items()}
    assert runs.differences(rounded, weights(out)) == []
    assert "rounded to bfloat16" in report(out)["compared"]
    assert transformers.AutoConfig.from_pretrained(out).dtype == torch.bfloat16


@pytest.mark.parametrize(("path", "same"), [("gpt2-hub", "gpt2"), ("llama-twice", "llama-tied-bfloat16")])
def test_files_as_older_releases_and_the_hub_have_them(path: str, same: str, families: Path) -> None:
    first, second = (runs.contents(families / f"{name}-checkpoint") for name in (path, same))
    del first["state"], second["state"]
    assert runs.differences(first, second) == []


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.corpus(tmp_path_factory.mktemp("corpus"))


def test_through_a_run_on_four_ranks_and_back(data: Path, tmp_path: Path) -> None:
    """Imported, trained at rate 0 under TP2 x PP2, exported: the same file, and a tokenizer that transformers reads."""
    model = make(tmp_path / "model", "Llama", {**DECODER, "vocab_size": 512, "num_hidden_layers": 4})
    converted(["hf-import", model, "--output", tmp_path / "imported", "--no-logits"])
    section = (tmp_path / "imported" / "config.yaml").read_text().splitlines()[1:]
    own = [f"model.{line.strip().replace(': ', '=')}" for line in section]
    layout = ["tensor_model_parallel_size=2", "pipeline_model_parallel_size=2", "sequence_parallel=true"]
    code = runs.train(
        tmp_path / "run",
        data,
        4,
        *own,
        "model.seq_length=32",
        *(f"parallel.{item}" for item in layout),
        f"checkpoint.pretrained_checkpoint={tmp_path / 'imported'}",
        "optimizer.lr=0.0",
        "train.train_iters=1",
        "train.eval_iters=0",
    )
    assert code == 0
    converted(["hf-export", tmp_path / "run", "--output", tmp_path / "exported"])
    assert (tmp_path / "exported" / "model.safetensors").read_bytes() == (model / "model.safetensors").read_bytes()
    found = report(tmp_path / "exported")
    assert found["summary"]["worst_relative_logit_error"] < 1e-5
    assert any("gives our ids of" in note for note in found["notes"]), found["notes"]
    text = "In the beginning\n    return 2"
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "exported")
    assert theirs.decode(theirs.encode(text, add_special_tokens=False)) == text
    assert transformers.AutoConfig.from_pretrained(tmp_path / "exported").eos_token_id == theirs.eos_token_id


def test_the_tokenizer_travels_both_ways(families: Path) -> None:
    model, again = families / "llama-tokenizer", families / "llama-tokenizer-again"
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (again / name).read_bytes() == (model / name).read_bytes()
    described = json.loads((again / "config.json").read_text())
    assert described["eos_token_id"] == 2, "config.json's own, as it was imported"


def test_an_import_is_a_checkpoint_like_any_other(families: Path) -> None:
    checkpoint = str(families / "llama-tokenizer-checkpoint")
    commands = [
        ["generate", checkpoint, "--prompt", "ab", "--max-new-tokens", "3"],
        ["checkpoint", "verify", checkpoint],
        ["checkpoint", "inspect", checkpoint],
    ]
    (code, said), (whole, verdict), (shown, contents) = mslm(commands)
    assert code == 0 and "ab" in said
    assert whole == 0 and verdict.strip().endswith("whole")
    assert shown == 0 and "2 x 192 x 48" in contents, "gate and up of two layers"


def test_wrong_bits_and_wrong_logits_are_found(families: Path, tmp_path: Path) -> None:
    """Each fault, planted, fails its own check with exit code 1; and nothing looks as if it were published."""
    command = ["convert", "hf-import", str(families / "llama"), "--output", str(tmp_path / "out")]
    (code, bits), (second, heads) = mslm([command] * 2, {0: "one bit too many", 1: "heads out of order"})
    assert code == 1 and "2 of 21 tensors are not what they were made from (model.layers.0.mlp.down_proj" in bits, bits
    assert second == 1 and "the logits are not those of transformers" in heads, heads
    assert list(tmp_path.iterdir()) == []


def test_without_transformers(families: Path, tmp_path: Path) -> None:
    command = ["convert", "hf-import", str(families / "llama"), "--output", str(tmp_path / "out")]
    missing = {0: "no transformers", 1: "no transformers"}
    (code, said), (code_without, _) = mslm([command, [*command, "--no-logits"]], missing)
    assert code == 2 and "pip install 'megatron-slm[hf]'" in said and said.count("\n") == 1
    assert code_without == 0
    assert report(tmp_path / "out")["without_logits"] == "--no-logits was given"
    assert "Not compared: --no-logits was given" in (tmp_path / "out" / "conversion.md").read_text()
