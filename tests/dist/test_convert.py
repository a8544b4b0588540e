"""``mslm convert``: Hugging Face models of every family become checkpoints and back, with the same bits and logits."""

from __future__ import annotations

import contextlib
import io
import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests import runs
from tests.ranks import run_ranks

transformers = pytest.importorskip("transformers")

VOCAB = 100  # 28 rows below the embedding's 128: padding must appear and vanish again

DECODER = {
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCAB,
    "max_position_embeddings": 128,
}
LLAMA3_ROPE = {
    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip
GPT2 = {"n_embd": 48, "n_layer": 2, "n_head": 4, "vocab_size": VOCAB, "n_positions": 64}
GPT2 |= {"bos_token_id": 0, "eos_token_id": 0}

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", DECODER),
    "llama-tied-bfloat16": ("Llama", {**DECODER, "tie_word_embeddings": True, "num_key_value_heads": 4}),
    "llama-biases-wide-heads": ("Llama", {**DECODER, "attention_bias": True, "mlp_bias": True, "head_dim": 16}),
    "llama-3.1": ("Llama", {**DECODER, "rope_parameters": LLAMA3_ROPE}),
    "qwen2": ("Qwen2", DECODER),
    "qwen3": ("Qwen3", {**DECODER, "head_dim": 16}),
    "mistral-window": ("Mistral", {**DECODER, "sliding_window": 64}),
    "mixtral": ("Mixtral", {**DECODER, "num_local_experts": 4}),
    "gpt2": ("GPT2", GPT2),
    "gpt2-untied-gelu": ("GPT2", {**GPT2, "tie_word_embeddings": False, "activation_function": "gelu", "n_inner": 80}),
}


def make(directory: Path, name: str, config: dict[str, Any], dtype: torch.dtype = torch.float32, **saved: Any) -> Path:
    """A random model, saved by transformers; weights large enough for logits of order 1."""
    torch.manual_seed(7)
    head = "LMHeadModel" if name == "GPT2" else "ForCausalLM"
    model = getattr(transformers, f"{name}{head}")(getattr(transformers, f"{name}Config")(**config))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(mean=1.0 if parameter.dim() == 1 else 0.0, std=0.1)
    model.to(dtype).save_pretrained(directory, **saved)
    return directory


def mslm(commands: list[list[str]], plant: str | None = None) -> list[tuple[int, str]]:
    """``mslm ...`` of each, one after the other in one process; the exit codes and what was said on standard error.

    Args:
        plant: a name of ``PLANTS``, done in that process before.
    """
    result: list[tuple[int, str]] = run_ranks(_run, 1, commands, plant)[0]
    for _, said in result:
        assert "Traceback" not in said, said
    return result


def converted(*commands: list[Any]) -> None:
    """Conversions that must succeed."""
    for code, said in mslm([["convert", *map(str, command)] for command in commands]):
        assert code == 0, said


def _run(commands: list[list[str]], plant: str | None) -> list[tuple[int, str]]:
    import torch.distributed as dist

    from megatron_slm import cli

    dist.destroy_process_group()  # a verb makes its own
    if plant is not None:
        PLANTS[plant]()
    ended = []
    for tokens in commands:
        with contextlib.redirect_stderr(io.StringIO()) as said, contextlib.redirect_stdout(io.StringIO()) as out:
            code = cli.main(tokens)
        ended.append((code, said.getvalue() + out.getvalue()))
    return ended


def _heads_out_of_order() -> None:
    """Reading and writing agree with each other, and are both wrong."""
    from megatron_slm.model import hf

    hf.by_group = lambda heads, groups, head_dim: torch.arange((heads + 2 * groups) * head_dim)


def _one_bit_too_many() -> None:
    """The disk gives back another number than was written."""
    from megatron_slm.train import payload_stream

    right = payload_stream.BlockReader.block

    def wrong(self: Any, name: str, offsets: Any, sizes: Any) -> torch.Tensor:
        found = right(self, name, offsets, sizes)
        if name == "decoder.layers.mlp.linear_fc2.weight":
            found.view(torch.int32)[0, 0, 0] ^= 1
        return found

    payload_stream.BlockReader.block = wrong


def _no_transformers() -> None:
    sys.modules["transformers"] = None  # what Python calls a module that may not be imported


PLANTS = {
    "heads out of order": _heads_out_of_order,
    "one bit too many": _one_bit_too_many,
    "no transformers": _no_transformers,
}


def weights(directory: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a Hugging Face directory."""
    found: dict[str, torch.Tensor] = {}
    for file in sorted(directory.glob("*.safetensors")):
        found |= load_file(file)
    return found


def report(directory: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((directory / "conversion.json").read_text())
    return found


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
    for path in (as_on_the_hub(root), stored_twice(root)):
        commands.append(["hf-import", path, "--output", f"{path}-checkpoint"])
    converted(*commands)
    return root


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


def test_the_tokenizer_travels_both_ways(families: Path, tmp_path: Path) -> None:
    model = shutil.copytree(families / "llama", tmp_path / "model")
    tokenizer = byte_level(["<|endoftext|>", "<|im_end|>"], 90)
    tokenizer.save(str(model / "tokenizer.json"))
    (model / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>"})
    )
    (model / "chat_template.jinja").write_text("{{ messages[0].content }}")
    generate = ["generate", str(tmp_path / "checkpoint"), "--prompt", "ab", "--max-new-tokens", "3"]
    commands = [
        ["convert", "hf-import", str(model), "--output", str(tmp_path / "checkpoint")],
        ["convert", "hf-export", str(tmp_path / "checkpoint"), "--output", str(tmp_path / "again")],
        generate,
        ["checkpoint", "verify", str(tmp_path / "checkpoint")],
        ["checkpoint", "inspect", str(tmp_path / "checkpoint")],
    ]
    for code, said in mslm(commands):
        assert code == 0, said
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (tmp_path / "again" / name).read_bytes() == (model / name).read_bytes()
    described = json.loads((tmp_path / "again" / "config.json").read_text())
    assert described["eos_token_id"] == 2, "config.json's own, as it was imported"


def byte_level(special: list[str], vocab_size: int) -> Any:
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers

    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=special, show_progress=False)
    made.train_from_iterator(["abcdefgh ijklm"], trainer)
    return made


def test_wrong_bits_and_wrong_logits_are_found(families: Path, tmp_path: Path) -> None:
    """Each fault, planted, fails its own check with exit code 1, and nothing looks as if it were published."""
    command = ["convert", "hf-import", str(families / "llama"), "--output", str(tmp_path / "out")]
    [(code, said)] = mslm([command], "one bit too many")
    assert code == 1 and "2 of 21 tensors are not what they were made from (model.layers.0.mlp.down_proj" in said, said
    [(code, said)] = mslm([command], "heads out of order")
    assert code == 1 and "the logits are not those of transformers" in said, said
    assert list(tmp_path.iterdir()) == []


def test_without_transformers(families: Path, tmp_path: Path) -> None:
    command = ["convert", "hf-import", str(families / "llama"), "--output", str(tmp_path / "out")]
    (code, said), (code_without, _) = mslm([command, [*command, "--no-logits"]], "no transformers")
    assert code == 2 and "pip install 'megatron-slm[hf]'" in said and said.count("\n") == 1
    assert code_without == 0
    assert report(tmp_path / "out")["without_logits"] == "--no-logits was given"
    assert "Not compared: --no-logits was given" in (tmp_path / "out" / "conversion.md").read_text()


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
def refusals(families: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[int, str]]:
    """What is said of each bad model; nothing may be left where the checkpoint would have been."""
    root, out = tmp_path_factory.mktemp("bad"), tmp_path_factory.mktemp("out")
    for name, (spoil, _) in BAD_MODELS.items():
        spoil(shutil.copytree(families / "llama", root / name))
    said = mslm([["convert", "hf-import", str(root / name), "--output", str(out / "x")] for name in BAD_MODELS])
    assert list(out.iterdir()) == []
    return dict(zip(BAD_MODELS, said, strict=True))


@pytest.mark.parametrize("name", BAD_MODELS)
def test_a_bad_model_is_refused_in_one_sentence(name: str, refusals: dict[str, tuple[int, str]]) -> None:
    code, said = refusals[name]
    assert code == 2
    assert re.search(BAD_MODELS[name][1], said), said
    assert said.startswith("mslm: ") and said.count("\n") == 1, said


def test_a_bad_wish_is_refused_in_one_sentence(families: Path, tmp_path: Path) -> None:
    """Of an export, and of any output that is there."""
    checkpoint, out = families / "llama-checkpoint", tmp_path / "x"
    damaged = shutil.copytree(checkpoint, tmp_path / "damaged")
    with (damaged / "__0_0.distcp").open("r+b") as stream:
        stream.seek(2000)
        stream.write(b"\0\1\2\3")
    (tmp_path / "there").mkdir()
    before = sorted(tmp_path.rglob("*"))
    cases: list[tuple[list[Any], str]] = [
        (["hf-import", families / "llama", "--output", tmp_path / "there"], "there exists"),
        (["hf-import", tmp_path / "nowhere", "--output", out], "has no config.json"),
        (["hf-import", families / "llama", "--output", tmp_path / "iter_0000007"], "an import is of step 0"),
        (["hf-export", checkpoint, "--output", tmp_path / "there"], "there exists"),
        (["hf-export", families / "llama", "--output", out], "holds no checkpoint"),
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
