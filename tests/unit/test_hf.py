"""Names, blocks and files of Hugging Face models, without a model of theirs or ours."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from megatron_slm.commands.convert import size_of
from megatron_slm.config.presets import PRESETS
from megatron_slm.convert.model_files import ModelFiles
from megatron_slm.convert.model_writer import Declared, ModelWriter
from megatron_slm.errors import CheckpointError, ConfigError
from megatron_slm.model.config import ModelConfig
from megatron_slm.model.counts import parameters
from megatron_slm.model.hf import blocks, by_group
from megatron_slm.model.hf_config import read_config
from megatron_slm.model.hf_config_out import choose_model_type, huggingface_config
from megatron_slm.train.payload_index import read_index
from megatron_slm.train.payload_stream import BlockReader, PayloadWriter

SMALL: dict[str, Any] = {
    "num_layers": 2, "hidden_size": 48, "ffn_hidden_size": 96, "num_attention_heads": 4, "num_query_groups": 2,
    "kv_channels": 12, "seq_length": 64, "max_position_embeddings": 64, "vocab_size": 100,
}  # fmt: skip
GPT2: dict[str, Any] = {
    "num_query_groups": 4, "position_embedding_type": "learned_absolute", "normalization": "LayerNorm",
    "swiglu": False, "openai_gelu": True, "add_bias_linear": True, "add_qkv_bias": True,
}  # fmt: skip
SECTIONS: dict[str, dict[str, Any]] = {
    "llama": {"use_rope_scaling": True, "rope_scaling_factor": 32.0, "rotary_base": 5e5},
    "mistral": {"kv_channels": 16, "untie_embeddings_and_output_weights": False},
    "qwen2": {"add_qkv_bias": True, "layernorm_epsilon": 1e-6, "attention_dropout": 0.1},
    "qwen3": {"qk_layernorm": True, "kv_channels": 32},
    "mixtral": {"num_moe_experts": 4, "moe_router_topk": 1},
    "gpt2": {**GPT2, "untie_embeddings_and_output_weights": False, "hidden_dropout": 0.1, "attention_dropout": 0.2},
}


@pytest.mark.parametrize("model_type", SECTIONS)
def test_a_section_becomes_a_config_and_the_same_section_again(model_type: str, tmp_path: Path) -> None:
    model = ModelConfig(**{**SMALL, **SECTIONS[model_type]})
    written = huggingface_config(model, model_type, vocab_size=100, dtype="float32", tokens={"eos_token_id": 3})
    (tmp_path / "config.json").write_text(json.dumps(written))
    read = read_config(tmp_path)
    assert (read.model_type, read.vocab_size, read.unread) == (model_type, 100, ())
    assert ModelConfig(**read.section) == model
    assert read.tokens == {"eos_token_id": 3}
    # Only this program's Mistral is Llama by another name.
    expected = "llama" if model_type == "mistral" else model_type
    assert choose_model_type(model, None) == expected
    assert choose_model_type(model, model_type) == model_type


@pytest.mark.parametrize(
    ("section", "field"),
    [
        ({"rotary_percent": 0.5}, "model.rotary_percent is 0.5, not 1.0"),
        ({"mup_base_hidden_size": 24}, "model.mup_base_hidden_size is 24, not 48"),
        ({"multi_latent_attention": True}, "model.multi_latent_attention is True, not False"),
        ({"mtp_num_layers": 1}, "model.mtp_num_layers is 1, not None"),
        ({"num_moe_experts": 4, "moe_shared_expert_intermediate_size": 8}, "moe_shared_expert_intermediate_size is 8"),
        ({**GPT2, "position_embedding_type": "none"}, "model.position_embedding_type is none, not learned_absolute"),
    ],
)
def test_what_no_type_can_express_is_refused_by_its_field(section: dict[str, Any], field: str) -> None:
    with pytest.raises(CheckpointError, match=field):
        choose_model_type(ModelConfig(**{**SMALL, **section}), None)


@pytest.mark.parametrize("name", ["llama3-8b", "llama3-405b", "qwen2.5-7b", "smollm2-135m", "gpt2"])
def test_the_blocks_of_a_preset_hold_its_published_parameters(name: str) -> None:
    preset = PRESETS[name]
    values = {key.removeprefix("model."): value for key, value in preset.values.items() if key.startswith("model.")}
    model = ModelConfig(**values)
    assert model.vocab_size is not None
    found = blocks(model, choose_model_type(model, None), model.vocab_size)
    elements = sum(torch.Size(part.shape).numel() for block in found for part in block.parts)
    assert elements == preset.parameters == parameters(model, model.vocab_size)
    assert len({part.name for block in found for part in block.parts}) == sum(len(block.parts) for block in found)


@pytest.mark.parametrize("model_type", SECTIONS)
def test_a_block_is_its_parts(model_type: str) -> None:
    """Joined, a block has the stored shape, zeros for padding, and splits into the same bits."""
    torch.manual_seed(0)
    for block in blocks(ModelConfig(**{**SMALL, **SECTIONS[model_type]}), model_type, 100):
        parts = [torch.randn(part.shape) for part in block.parts]
        joined = block.join(parts)
        assert joined.shape == block.shape and not joined[block.rows :].any()
        for part, piece in zip(parts, block.split(joined), strict=True):
            assert piece.equal(part) and piece.is_contiguous()


def test_rows_lie_by_key_value_head() -> None:
    """Four query heads of two channels in two groups: heads 0 and 1, key 0, value 0; then those of group 1."""
    queries, keys, values = list(range(8)), list(range(8, 12)), list(range(12, 16))
    assert by_group(4, 2, 2).tolist() == [*queries[:4], *keys[:2], *values[:2], *queries[4:], *keys[2:], *values[2:]]


def test_written_files_are_the_library_s_own(tmp_path: Path) -> None:
    """In any order of writing; several shards have an index that says where each tensor is."""
    tensors = {"b.x": torch.randn(3, 5), "a": torch.randn(7).bfloat16(), "c": torch.randn(2, 2).half()}
    save_file(tensors, tmp_path / "expected", metadata={"format": "pt"})
    declared = [Declared(name, tuple(t.shape), str(t.dtype).removeprefix("torch.")) for name, t in tensors.items()]
    for limit, files in ((10**6, 1), (60, 2), (1, 3)):
        out = tmp_path / str(limit)
        out.mkdir()
        writer = ModelWriter(out, declared, limit)
        for name in reversed(tensors):
            writer.write(name, tensors[name])
        writer.close()
        assert len(list(out.glob("*.safetensors"))) == files
        read = ModelFiles(out)
        assert all(read.read(name).equal(tensor) for name, tensor in tensors.items())
    assert (tmp_path / "1000000" / "model.safetensors").read_bytes() == (tmp_path / "expected").read_bytes()


def test_blocks_are_read_across_the_chunks_of_any_layout(tmp_path: Path) -> None:
    """Written as two halves of columns, in files that are full after one block; read as rows of one layer."""
    whole = torch.arange(2 * 4 * 6, dtype=torch.float32).view(2, 4, 6)
    writer = PayloadWriter(tmp_path, file_bytes=1)
    for layer in range(2):
        for column in (0, 3):
            part = whole[layer : layer + 1, :, column : column + 3]
            writer.block("x", part, offsets=(layer, 0, column), shape=whole.shape)
    writer.close()
    assert len(list(tmp_path.glob("*.distcp"))) == 4
    reader = BlockReader(tmp_path, read_index(tmp_path))
    assert reader.block("x", (1, 1, 2), (1, 2, 3)).equal(whole[1:2, 1:3, 2:5])
    with pytest.raises(CheckpointError, match="the pieces of x do not cover it"):
        reader.block("x", (1, 2, 0), (1, 4, 6))
    with pytest.raises(CheckpointError, match="has no tensor 'y'"):
        reader.block("y", (0,), (1,))


@pytest.mark.parametrize(("text", "size"), [("5GB", 5 * 10**9), ("1.5 GiB", 3 * 2**29), ("100", 100), ("20kb", 20_000)])
def test_sizes(text: str, size: int) -> None:
    assert size_of(text) == size


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "0", "5 apples", "nan"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(ConfigError, match="--max-shard-size"):
        size_of(text)
