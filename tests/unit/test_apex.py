"""A module named apex is taken for NVIDIA's only with NVIDIA's kernels. The apex of these tests is a FAKE directory."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_slm.errors import LaunchError
from megatron_slm.parallel import apex

PRELOAD = (
    "from megatron_slm.errors import LaunchError\n"
    "from megatron_slm.parallel import device\n"
    "try:\n"
    "    device.preload('cuda')\n"
    "except LaunchError as error:\n"
    "    print(error)\n"
    "import sys\n"
    "assert 'megatron.core' not in sys.modules, 'refused before core looks for it'\n"
)
CHOSEN = (
    "import torch\n"
    "from megatron_slm.parallel import apex\n"
    "apex.refuse_without_kernels()\n"
    "from types import SimpleNamespace\n"
    "from megatron.core.optimizer import Adam\n"
    "from megatron_slm.model.config import ModelConfig\n"
    "from megatron_slm.parallel.norm import ApexNorm, Norm\n"
    "from megatron_slm.parallel.specs import choose_spec\n"
    "from megatron_slm.train.optimizer import kernels_reason\n"
    "spec, norm, reason = choose_spec('cuda', ModelConfig(), packed_documents=False)\n"
    "assert norm is ApexNorm and spec.submodules.input_layernorm is ApexNorm\n"
    "print(reason)\n"
    "built = SimpleNamespace(optimizer=Adam([torch.nn.Parameter(torch.ones(1))]))\n"
    "print(kernels_reason(built))\n"
    "for kind in ('RMSNorm', 'LayerNorm'):\n"
    "    config = SimpleNamespace(normalization=kind, sequence_parallel=True)\n"
    "    ours, theirs, x = Norm(config, 8), ApexNorm(config, 8), torch.randn(3, 2, 8)\n"
    "    assert torch.equal(ours(x), theirs(x)) and list(ours.state_dict()) == list(theirs.state_dict())\n"
)
FAKE = {
    "apex/__init__.py": "",
    "apex/optimizers.py": (
        "import torch\nclass FusedAdam(torch.optim.AdamW): pass\nclass FusedSGD(torch.optim.SGD): pass\n"
    ),
    "apex/multi_tensor_apply.py": "def multi_tensor_applier(*a): raise NotImplementedError\n",
    "apex/normalization/__init__.py": "",
    "apex/normalization/fused_layer_norm.py": (
        "import torch.nn.functional as F\n"
        "class FusedLayerNormAffineFunction: pass\n"
        "def fused_layer_norm_affine(x, weight, bias, shape, eps): return F.layer_norm(x, shape, weight, bias, eps)\n"
        "def fused_rms_norm_affine(x, weight, shape, eps): return F.rms_norm(x, shape, weight, eps)\n"
    ),
    "amp_C.py": "multi_tensor_l2norm = multi_tensor_scale = None\n",
    "fused_layer_norm_cuda.py": "",
}


def placed(directory: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_text(text)


def ran(program: str, directory: Path, files: dict[str, str]) -> str:
    """What a process says that finds ``files`` as its modules."""
    placed(directory, files)
    environment = {**os.environ, "PYTHONPATH": str(directory), "PYTHONWARNINGS": "ignore"}
    ended = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


def test_another_package_is_refused_before_core_looks(tmp_path: Path) -> None:
    said = ran(PRELOAD, tmp_path, {"apex/__init__.py": ""})
    assert said.startswith(
        f"the module 'apex' ({tmp_path}/apex/__init__.py) has none of NVIDIA's kernels (no module amp_C)"
    )
    assert "pip uninstall apex" in said and "https://github.com/NVIDIA/apex" in said


@pytest.mark.parametrize(
    ("files", "why"),
    [
        ({"apex/__init__.py": "", "amp_C.py": "raise ImportError('undefined symbol: x')"}, "undefined symbol: x"),
        ({"apex/__init__.py": "", "amp_C.py": ""}, "No module named 'apex.optimizers'"),
    ],
    ids=["built for another torch", "a part of it"],
)
def test_nvidias_without_whole_kernels_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: dict[str, str], why: str
) -> None:
    placed(tmp_path, files)
    monkeypatch.syspath_prepend(str(tmp_path))
    try:
        with pytest.raises(LaunchError, match=f"has none of NVIDIA's kernels .{why}.*pip uninstall apex"):
            apex.refuse_without_kernels()
    finally:
        for name in ("apex", "amp_C"):
            sys.modules.pop(name, None)


def test_no_apex_is_nothing_wrong() -> None:
    apex.refuse_without_kernels()
    assert not apex.has_norms()


def test_a_whole_apex_gives_optimizer_and_norms(tmp_path: Path) -> None:
    """What is chosen, and that it is called with our parameters; the kernels themselves need a GPU."""
    layers, optimizer = ran(CHOSEN, tmp_path, FAKE).splitlines()
    assert layers == (
        "layers: core's parallel linears, apex's fused norms and our SDPA attention, because Transformer Engine is not "
        "installed, and NVIDIA apex is"
    )
    assert optimizer == (
        "optimizer: FusedAdam of NVIDIA apex, because it can be imported and Transformer Engine cannot"
    )
