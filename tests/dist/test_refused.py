"""What `config.rules` refuse because core 0.16.1 computes it wrongly is still wrong: a new core makes these fail.

A test that fails says that its rule can go, together with its lines in ``tests/axes.py``.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from megatron_slm.config import rules
from megatron_slm.config.run_config import RunConfig
from tests.axes import case, config_of
from tests.job import train
from tests.ranks import RankFailure, run_ranks


def refused(config: RunConfig, said: str, **model: Any) -> RunConfig:
    """A configuration that breaks one rule, which says ``said``."""
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, **model))
    found = rules.violations(config, config.parallel.world_size)
    assert len(found) == 1 and said in found[0], found
    return config


def test_an_experts_output_bias_is_added_to_what_autograd_still_needs() -> None:
    experts = config_of(case(mlp="experts"))
    config = refused(experts, "adds up the gradients of an expert's output bias", add_bias_linear=True, swiglu=False)
    with pytest.raises(RankFailure, match="is a view and is being modified inplace"):
        run_ranks(train, 1, config, 1)


def test_the_backward_pass_of_a_recomputed_mlp_with_biases_never_ends() -> None:
    config = refused(config_of(case(recompute="mlp")), "calls itself without end", add_bias_linear=True)
    with pytest.raises(RankFailure):
        run_ranks(train, 1, config, 1, timeout_s=8.0)
