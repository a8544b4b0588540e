"""NVIDIA apex, where it is really there: core takes any module of that name for it, and breaks on another one.

Core asks for Transformer Engine first, so apex's optimizer and norms are used on GPUs without that.
"""

from __future__ import annotations

import importlib
import importlib.util

from megatron_slm.errors import LaunchError

OPTIMIZER_KERNELS, NORM_KERNELS = "amp_C", "fused_layer_norm_cuda"


def refuse_without_kernels() -> None:
    """Refuse a module named apex without the kernels of NVIDIA's. Nothing is wrong where there is none.

    Raises:
        LaunchError: PyPI's apex, another one, or NVIDIA's without its kernels or with those of another torch.
    """
    found = importlib.util.find_spec("apex")
    if found is None:
        return
    try:
        if importlib.util.find_spec(OPTIMIZER_KERNELS) is None:
            raise ImportError(f"no module {OPTIMIZER_KERNELS}")
        importlib.import_module("torch")  # loads the libraries that the kernels are linked with
        importlib.import_module(OPTIMIZER_KERNELS)
        importlib.import_module("apex.optimizers")
    except ImportError as error:
        place = found.origin or ", ".join(found.submodule_search_locations or ())
        raise LaunchError(
            f"the module 'apex' ({place}) has none of NVIDIA's kernels ({error}), and core would take it for NVIDIA's: "
            "pip uninstall apex (PyPI's is another package), and do without, or build NVIDIA's from "
            "https://github.com/NVIDIA/apex with --cpp_ext and --cuda_ext for this torch. Transformer Engine, or "
            "torch's own fused AdamW, takes its place."
        ) from error


def has_norms() -> bool:
    """Whether apex's fused norms can be imported, after ``refuse_without_kernels`` has found nothing wrong."""
    return all(importlib.util.find_spec(name) is not None for name in ("apex", NORM_KERNELS))
