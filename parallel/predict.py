"""The layers of multi-token prediction: core's, around our norms and the model's own last kind of layer."""

from __future__ import annotations

from typing import Any

from megatron.core.tensor_parallel import ColumnParallelLinear
from megatron.core.transformer.multi_token_prediction import (
    MultiTokenPredictionBlockSubmodules,
    MultiTokenPredictionLayer,
    MultiTokenPredictionLayerSubmodules,
)
from megatron.core.transformer.spec_utils import ModuleSpec


def prediction_submodules(layer: ModuleSpec, norm: Any, depths: int) -> MultiTokenPredictionBlockSubmodules:
    """``depths`` layers that each see one token further.

    Args:
        layer: spec of the transformer layer inside each of them, which is the model's last one.
        norm: class of the three norms around it.
    """
    prediction = ModuleSpec(
        module=MultiTokenPredictionLayer,
        submodules=MultiTokenPredictionLayerSubmodules(
            enorm=norm, hnorm=norm, eh_proj=ColumnParallelLinear, transformer_layer=layer, layer_norm=norm
        ),
    )
    return MultiTokenPredictionBlockSubmodules(layer_specs=[prediction] * depths)
