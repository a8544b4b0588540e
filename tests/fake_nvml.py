"""A FAKE NVML for tests of code that reads GPUs through the real bindings, on machines without a driver."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from pathlib import Path

import pytest

SOURCE = Path(__file__).with_name("fixtures") / "fake_nvml.c"


def built(directory: Path) -> Path:
    """The library in ``directory``, under the name that the bindings ask the loader for."""
    if shutil.which("gcc") is None:
        pytest.skip("the fake NVML is built with gcc, which is not installed")
    library = directory / "libnvidia-ml.so.1"
    if not library.exists():
        command = ["gcc", "-shared", "-fPIC", "-Wl,-soname,libnvidia-ml.so.1", "-o", str(library), str(SOURCE)]
        subprocess.run(command, check=True)
    return library


def load(library: str) -> None:
    """Let the loader find the fake by its name from now on, in this process: it looks first at what is loaded."""
    ctypes.CDLL(library)


def environment(directory: Path, words: str = "", gpus: int = 2) -> dict[str, str]:
    """Variables for a process that is to find made-up GPUs; builds the library in ``directory`` if it is not there.

    Args:
        words: what ails the last GPU (see the source).
    """
    built(directory)
    return {**os.environ, "LD_LIBRARY_PATH": str(directory), "FAKE_NVML": words, "FAKE_NVML_GPUS": str(gpus)}
