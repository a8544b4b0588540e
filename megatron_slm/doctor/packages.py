"""Optional packages: there and importable, or the exact command that installs them. No torch.

Everything is imported in a process of its own: an import may crash, hang, or start an MPI job of its own.
"""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
from collections.abc import Collection, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import MappingProxyType

from packaging.version import Version

from megatron_slm.doctor.result import Result
from megatron_slm.doctor.versions import version_of

SUBJECT = "packages"
LAUNCHER_PREFIXES = ("PMI", "OMPI_", "PRTE_", "MPI_", "HYDRA_", "HYDI_", "SLURM_", "RANK", "LOCAL_RANK", "WORLD_SIZE")
"""Beginnings of variables by which an imported MPI would take itself for a rank of this job."""


@dataclass(frozen=True)
class Import:
    """A package whose import is tried.

    Attributes:
        module: it is installed where this is found; finding it imports nothing but an empty ``nvidia`` or ``megatron``.
        modules: all must be importable, in this order.
        distribution: pip's name; None where no package index has it.
        install: the command.
        what_for: what is lost without it.
        device: where it is of use: ``cuda`` or ``any``.
        needed: nothing runs without it.
    """

    module: str
    modules: tuple[str, ...]
    distribution: str | None
    install: str
    what_for: str
    device: str = "cuda"
    needed: bool = False


OWN_PYNVML = Version("12.0")
"""From here on the distribution pynvml only asks for nvidia-ml-py."""
APEX = (
    "git clone https://github.com/NVIDIA/apex && cd apex && APEX_CPP_EXT=1 APEX_CUDA_EXT=1 "
    "pip install -v --no-build-isolation ."
)
IMPORTS: Mapping[str, Import] = MappingProxyType(
    {
        "megatron-core": Import(
            "megatron.core",
            ("torch", "megatron.core"),
            "megatron-core",
            "pip install torch==2.13.0 megatron-core==0.16.1",
            "all",
            "any",
            needed=True,
        ),
        "transformer-engine": Import(
            "transformer_engine",
            ("torch", "transformer_engine.pytorch"),
            "transformer-engine",
            'pip install --no-build-isolation "transformer-engine[pytorch]==2.11.0"',
            "FP8, fused attention and grouped experts",
        ),
        # Not `apex`: any module of that name satisfies megatron-core, which then asks it for kernels it has not.
        "apex": Import(
            "apex",
            ("torch", "amp_C", "fused_weight_gradient_mlp_cuda", "apex.optimizers"),
            None,
            APEX,
            "fused Adam and norms and gradient accumulation fusion; core has others without it",
        ),
        "dali": Import(
            "nvidia.dali",
            ("nvidia.dali",),
            "nvidia-dali-cuda130",
            "pip install nvidia-dali-cuda130==2.4.0",
            "its loader",
            "any",
        ),
        "mpi4py": Import(
            "mpi4py", ("mpi4py.MPI",), "mpi4py", "pip install mpi4py==4.1.2 mpich==5.0.2", "mpirun", "any"
        ),
        "flash-attn": Import(
            "flash_attn",
            ("torch", "flash_attn"),
            "flash-attn",
            "pip install flash-attn --no-build-isolation",
            "its attention",
        ),
        "triton": Import("triton", ("triton",), "triton", "pip install triton", "this program's own kernels"),
    }
)


def probe(device: str, needed: Collection[str] = (), *, imports: bool = True, limit_s: float = 30.0) -> list[Result]:
    """Every package of the table, and the names that are somebody else's.

    Args:
        device: ``cuda`` or ``cpu``: what is of use there.
        needed: names of the table that the job cannot do without.
        imports: try the imports; otherwise only whether they are installed.
        limit_s: for one import.
    """
    present = {name for name, package in IMPORTS.items() if is_there(package.module)}
    ended: dict[str, str] = {}
    if imports:
        with ThreadPoolExecutor(max_workers=4) as pool:
            tried = {name: pool.submit(import_problem, IMPORTS[name].modules, limit_s) for name in present}
            ended = {name: future.result() for name, future in tried.items()}
    results = [
        _judged(name, package, device, name in present, ended.get(name, ""), name in needed)
        for name, package in IMPORTS.items()
    ]
    if not imports:
        results = [_untried(result) for result in results]
    return [*results, *impostors()]


def import_problem(modules: Iterable[str], limit_s: float) -> str:
    """Why the modules cannot be imported, in a process of its own; empty where they can."""
    program = "import importlib, sys\nfor name in sys.argv[1:]: importlib.import_module(name)"
    variables = {name: value for name, value in os.environ.items() if not name.startswith(LAUNCHER_PREFIXES)}
    try:
        ended = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", program, *modules],
            capture_output=True,
            text=True,
            errors="replace",
            timeout=limit_s,
            env=variables,
            stdin=subprocess.DEVNULL,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return f"the import takes longer than {limit_s:g} s"
    if ended.returncode < 0:
        return f"the import crashes ({signal.Signals(-ended.returncode).name})"
    if ended.returncode == 0:
        return ""
    lines = ended.stderr.strip().splitlines() or [f"exit code {ended.returncode}"]
    return lines[-1][:160]


def impostors() -> Iterator[Result]:
    """Distributions under the names of NVIDIA's that are not them."""
    if (version := version_of("apex")) is not None and not is_there("amp_C"):
        yield Result(
            SUBJECT,
            "apex on PyPI",
            "fail",
            f"apex {version} without amp_C: not NVIDIA's, yet megatron-core takes any module of this name for it",
            "NVIDIA's, built from source, or none",
            f"The PyPI name apex is an unrelated package: pip uninstall apex; NVIDIA's is built: {APEX}.",
        )
    if (version := version_of("nvidia-dali")) is not None:
        yield Result(
            SUBJECT,
            "nvidia-dali on PyPI",
            "fail",
            f"nvidia-dali {version} holds a warning and no DALI",
            "nvidia-dali-cuda130",
            "The PyPI name nvidia-dali is a stub: pip uninstall nvidia-dali && pip install nvidia-dali-cuda130==2.4.0.",
        )
    if (version := version_of("pynvml")) is not None and Version(version) < OWN_PYNVML:
        yield Result(
            SUBJECT,
            "pynvml on PyPI",
            "fail",
            f"pynvml {version} puts a module of its own in the place of nvidia-ml-py's",
            "nvidia-ml-py alone",
            "Take it out: pip uninstall pynvml && pip install --force-reinstall nvidia-ml-py.",
        )


def is_there(module: str) -> bool:
    """Whether a module of that name is installed."""
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        return False


def _judged(name: str, package: Import, device: str, present: bool, problem: str, needed: bool) -> Result:
    needed, useful = needed or package.needed, package.device in ("any", device)
    version = (version_of(package.distribution) if package.distribution else None) or "a module of that name"
    if not present:
        value = f"not installed; it is for {package.what_for}"
        if needed:
            remedy = f"This configuration needs it: {package.install}"
            return Result(SUBJECT, name, "fail", value, "installed", remedy)
        wanted = "where wanted" if useful else "on GPUs"
        return Result(SUBJECT, name, "absent", value, f"{wanted}: {package.install}")
    if device == "cpu" and name in ("transformer-engine", "apex"):
        return Result(
            SUBJECT,
            name,
            "fail",
            f"{version} is importable, and megatron-core takes its CUDA kernels for CPU ranks too",
            "none on a CPU machine",
            f"Take it out of this environment: pip uninstall {package.distribution or name}.",
        )
    if problem and name == "apex":
        remedy = f"Take it away (pip uninstall apex), or build NVIDIA's: {package.install}"
        return Result(SUBJECT, name, "fail", f"no kernels of NVIDIA's in it: {problem}", "amp_C and others", remedy)
    if problem:
        return Result(
            SUBJECT, name, "fail", f"{version}: {problem}", "importable", f"Install it anew: {package.install}"
        )
    return Result(SUBJECT, name, "ok", version, "importable")


def _untried(result: Result) -> Result:
    """Without ``imports`` nothing is known to be importable."""
    if result.state != "ok":
        return result
    return Result(SUBJECT, result.name, "ok", f"{result.value}, its import not tried", "importable")
