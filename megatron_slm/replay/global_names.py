"""Tensors of a checkpoint under names and in an order that do not depend on the layout."""

from __future__ import annotations

import re
from collections.abc import Iterator

from torch import Tensor

STACKED = re.compile(r"(^|\.)decoder\.layers\.(?=\D)")
"""In front of a name whose first axis is the layer."""
EXPERTS = "experts.experts."
"""In a name whose next axis is the expert."""
MODULES = {
    "self_attention.linear_qkv.layer_norm": "input_layernorm",
    "mlp.linear_fc1.layer_norm": "pre_mlp_layernorm",
}
"""A checkpoint's name of a norm that may be fused with the matrix behind it -> the module that it is."""
SECTIONS = ("embedding", "decoder.layers", "decoder", "mtp", "output_layer")
IN_LAYER = ("input_layernorm", "self_attention", "pre_cross_attn_layernorm", "pre_mlp_layernorm", "mlp")


def module_of(name: str) -> str:
    """``optimizer.state.exp_avg.decoder.layers.1.mlp.linear_fc1.layer_norm_weight`` -> its module's global name."""
    name = _parameter(name)
    for stored, module in MODULES.items():
        if stored in name:
            return name.partition(stored)[0] + module
    return name.rpartition(".")[0] or name


def parts_of(name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """A stacked tensor's layers and experts, each under its own name."""
    if (stacked := STACKED.search(name)) and tensor.dim():
        before, behind = name[: stacked.end()], name[stacked.end() :]
        for layer, part in enumerate(tensor):
            yield from parts_of(f"{before}{layer}.{behind}", part)
    elif EXPERTS in name and tensor.dim():
        for expert, part in enumerate(tensor):
            yield f"{name}[{expert}]", part
    else:
        yield name, tensor


def kind_of(name: str) -> str:
    """All layers' and experts' tensors of one name count as one where rounding is measured."""
    return re.sub(r"\d+", "*", name)


def _parameter(name: str) -> str:
    """A name without what stands in front of the parameter's (``optimizer.state.exp_avg.``, ``ema.``)."""
    found = re.search(r"(^|\.)(embedding|decoder|mtp|output_layer)\.", name)
    return name[found.start() :].lstrip(".") if found else name


def place_of(name: str) -> tuple[int, int, int, str]:
    """What sorts tensors as the forward pass uses them."""
    module = module_of(name)
    section = next((place for place, start in enumerate(SECTIONS) if module.startswith(start)), len(SECTIONS))
    layer, _, inner = module.removeprefix("decoder.layers.").partition(".")
    if not layer.isdigit():
        return section, 0, 0, name
    inside = next((place for place, start in enumerate(IN_LAYER) if inner.startswith(start)), len(IN_LAYER))
    return section, int(layer), inside, name
