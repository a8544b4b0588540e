"""Versions against those that everything here is tried with, and against those of the other nodes. No torch."""

from __future__ import annotations

import platform
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from importlib import metadata
from types import MappingProxyType

from packaging.specifiers import SpecifierSet
from packaging.version import InvalidVersion, Version

from megatron_slm.doctor.result import Result, State

SUBJECT = "versions"


@dataclass(frozen=True)
class Package:
    """A distribution, by the name that pip gives it.

    Attributes:
        tested: the version everything is tried with (``constraints.txt``).
        allowed: versions that are expected to work; ``setup.py`` has the same.
        needed: without it nothing runs.
        bad: versions that are known not to work -> why.
    """

    tested: str
    allowed: str
    needed: bool = True
    bad: Mapping[str, str] = field(default_factory=dict)


PACKAGES: Mapping[str, Package] = MappingProxyType(
    {
        "torch": Package("2.13.0", ">=2.11,<2.14"),
        "megatron-core": Package(
            "0.16.1", "==0.16.1", bad={">=0.17": "it needs Python 3.12, and parallel/device.py is written for 0.16.1"}
        ),
        "numpy": Package("2.4.6", ">=1.26"),
        "nvidia-ml-py": Package("13.615.71", ">=12.560"),
        "psutil": Package("7.2.2", ">=5.9"),
        "pyarrow": Package("26.0.1", ">=17"),
        "safetensors": Package("0.8.0", ">=0.4.5"),
        "sentencepiece": Package("0.2.3", ">=0.2"),
        "tensorboard": Package("2.21.0", ">=2.16"),
        "transformer-engine": Package(
            "2.11.0",
            ">=2.9,<2.12",
            needed=False,
            bad={">=2.12": "megatron-core 0.16.1 takes Transformer Engine below 2.12 alone"},
        ),
        "nvidia-dali-cuda130": Package("2.4.0", ">=1.50", needed=False),
        "mpi4py": Package("4.1.2", ">=4.0", needed=False),
        "mpich": Package("5.0.2", ">=4.0", needed=False),
        "transformers": Package("5.23.0", ">=5.0,<6", needed=False),
        "tokenizers": Package("0.23.3", ">=0.22", needed=False),
    }
)
PYTHON = Package("3.11.7", ">=3.10,<3.13", bad={">=3.13": "megatron-core 0.16.1 is not tried with it"})


def installed() -> dict[str, str]:
    """Python and every distribution of the table that is installed, with its version: compared between nodes."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        if (version := version_of(name)) is not None:
            found[name] = version
    return found


def version_of(distribution: str) -> str | None:
    """As its metadata says; None where it is not installed."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def probe() -> Iterator[Result]:
    """Every package of the table."""
    for name, package in {"python": PYTHON, **PACKAGES}.items():
        version = platform.python_version() if name == "python" else version_of(name)
        if version is not None:
            yield judged(name, version, package)
        elif package.needed:
            remedy = f'pip install "{name}{package.allowed}"'
            yield Result(SUBJECT, name, "fail", "not installed", package.tested, f"Install it: {remedy}.")


def judged(name: str, version: str, package: Package) -> Result:
    """Tested, allowed, or neither."""
    expected = f"tested {package.tested}, allowed {package.allowed}"
    try:
        number = Version(version)
    except InvalidVersion:
        return Result(SUBJECT, name, "warn", version, expected, f"Install a release: pip install {name}.")
    for versions, reason in package.bad.items():
        if SpecifierSet(versions, prereleases=True).contains(number):
            return Result(SUBJECT, name, "fail", f"{version}: {reason}", expected, _install(name, package))
    if not SpecifierSet(package.allowed, prereleases=True).contains(number):
        state: State = "fail" if package.needed else "warn"
        return Result(SUBJECT, name, state, version, expected, _install(name, package))
    # Local parts (+cpu, +cu130) name the build, not the release.
    return Result(SUBJECT, name, "ok", version, "tested" if number.public == package.tested else expected)


def _install(name: str, package: Package) -> str:
    if name == "python":
        return f"Make the environment anew with Python {package.tested}."
    return f'Install the tested one: pip install "{name}=={package.tested}".'
