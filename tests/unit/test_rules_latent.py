"""Rules of multi-latent attention and multi-token prediction: each broken once, alone, with the way out."""

from __future__ import annotations

import pytest

from megatron_slm.config.load import load
from megatron_slm.config.rules import violations

MLA = ["--multi-latent-attention", "--kv-lora-rank=16", "--qk-head-dim=16", "--qk-pos-emb-head-dim=8"]
YARN = [*MLA, "--rope-type=yarn"]
MTP = ["--mtp-num-layers=2"]
FULL = ["--recompute-granularity=full", "--recompute-method"]
SELECTIVE = ["--recompute-granularity=selective", "--recompute-modules"]


def broken(overrides: list[str]) -> list[str]:
    resolved = load(None, overrides)
    return violations(resolved.config, provenance=resolved.provenance)


ACCEPTED = [
    MLA,
    [*MLA, "--q-lora-rank=24", "--tensor-model-parallel-size=4", "--qk-layernorm", "--v-head-dim=12"],
    [*MLA, "--hidden-size=100", "--num-attention-heads=3", "--rotary-percent=0.5"],
    [*YARN, "--rotary-scaling-factor=4", "--mscale-all-dim=1", "--original-max-position-embeddings=64"],
    [*MLA, *SELECTIVE, "mla_up_proj", "core_attn"],
    [*MTP, "--mtp-loss-scaling-factor=0.3", "--position-embedding-type=none"],
    [*MTP, *FULL, "uniform", "--recompute-num-layers=1"],
    [*MTP, *MLA, "--pipeline-model-parallel-size=2", "--untie-embeddings-and-output-weights"],
]


@pytest.mark.parametrize("overrides", ACCEPTED)
def test_accepted(overrides: list[str]) -> None:
    assert broken(overrides) == []


REFUSED = [
    (["--kv-lora-rank=16"], ("kv_lora_rank = 16 (command line)", "multi_latent_attention = false", "=true")),
    (["--rope-type=yarn"], ("rope_type = yarn", "multi_latent_attention=true")),
    (["--mscale-all-dim=1"], ("mscale_all_dim = 1.0", "ignored", "multi_latent_attention=true")),
    ([*MLA, "--num-query-groups=2"], ("num_query_groups = 2", "keys and values of its own", "to 4")),
    ([*MLA, "--kv-channels=8"], ("kv_channels = 8", "qk_head_dim", "ignored")),
    ([*MLA, "--add-qkv-bias"], ("add_qkv_bias = true", "no biases")),
    ([*MLA, "--use-rope-scaling"], ("use_rope_scaling = true", "rope_type=yarn")),
    ([*MLA, "--position-embedding-type=none"], ("position_embedding_type =", "always rotates its 8", "=rope")),
    ([*MLA, "--mscale-all-dim=1"], ("mscale_all_dim = 1.0", "rope_type = rope", "rope_type=yarn")),
    ([*YARN, "--rotary-percent=0.5"], ("rotary_percent = 0.5", "YaRN", "rope_type=rope")),
    ([*MLA, "--rotary-percent=0.4"], ("rotary_percent = 0.4", "make 3 rotated", "even")),
    ([*MLA, "--q-lora-rank=25", "--tensor-model-parallel-size=2"], ("q_lora_rank = 25", "24 or 26")),
    (["--multi-latent-attention", "--tensor-model-parallel-size=4", "--kv-lora-rank=10"], ("74 channels", "size: 2")),
    ([*SELECTIVE, "mla_up_proj"], ("recompute_modules", "mla_up_proj", "multi_latent_attention=true")),
    (["--mtp-loss-scaling-factor=0.3"], ("mtp_loss_scaling_factor = 0.3", "mtp_num_layers = null", "1 or more")),
    ([*MTP, "--position-embedding-type=learned_absolute"], ("mtp_num_layers = 2", "learned_absolute", "=rope")),
    (["--mtp-num-layers=8", "--seq-length=8"], ("mtp_num_layers = 8", "seq_length = 8", "mtp_num_layers: 7")),
    ([*MTP, *FULL, "block", "--recompute-num-layers=1"], ("recompute_method = block", "uniform")),
    ([*MTP, *FULL, "uniform", "--recompute-num-layers=2"], ("recompute_num_layers = 2", "recompute_num_layers=1")),
]


@pytest.mark.parametrize(("overrides", "words"), REFUSED, ids=lambda value: " ".join(value)[:60])
def test_refused_alone_with_keys_values_and_way_out(overrides: list[str], words: tuple[str, ...]) -> None:
    found = broken(overrides)
    assert len(found) == 1, found
    assert all(word in found[0] for word in words), found[0]
    assert "\n" not in found[0]
