"""What the doctor says of GPUs: through the real bindings, of a FAKE driver; and without any driver."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests import fake_nvml

PROGRAM = (
    "import dataclasses, json, sys\n"
    "from megatron_slm.doctor import gpus\n"
    "results = [dataclasses.asdict(one) for one in gpus.probe(int(sys.argv[1]))]\n"
    "print(json.dumps([results, gpus.facts(), gpus.count()]))"
)


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fake-nvml")


def probed(environment: dict[str, str] | None, ranks_here: int = 0) -> tuple[dict[str, dict[str, str]], dict[str, str]]:
    """(results by name, facts) in a process that finds the library of ``environment``."""
    ended = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(ranks_here)], env=environment, capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, ended.stderr
    results, facts, count = json.loads(ended.stdout)
    assert count == (0 if not facts else int(facts["GPUs"].split()[0]))
    return {one["name"]: one for one in results}, facts


def test_sound_gpus_of_a_fake_driver(library: Path) -> None:
    found, facts = probed(fake_nvml.environment(library), ranks_here=2)
    assert {one["state"] for one in found.values()} == {"ok"}, found
    assert found["driver"]["value"] == "580.00.fake, CUDA up to 13.0"
    assert found["GPU 1"]["value"] == "Fake H200, 140.0 GiB, 0.0 in use, NVLink 4 of 4 up, PCIe x16"
    assert found["topology"]["value"] == "1 pair(s): across sockets"
    assert facts == {"NVIDIA driver": "580.00.fake", "GPUs": "2 x Fake H200"}


@pytest.mark.parametrize(
    ("words", "name", "state", "said"),
    [
        ("ecc-off", "GPU 1 ECC", "warn", "off"),
        ("ecc-errors", "GPU 1 ECC errors", "fail", "3 uncorrected"),
        ("rows", "GPU 1 memory rows", "warn", "waits to be remapped"),
        ("mig", "GPU 1 MIG", "fail", "on"),
        ("prohibited", "GPU 1 compute mode", "fail", "prohibited"),
        ("busy", "GPU 1 memory", "warn", "9.0 GiB in use"),
        ("nvlink-down", "same NVLink", "warn", "NVLink 3 of 4 up"),
        ("narrow", "same PCIe", "warn", "PCIe x4 of x16"),
        ("other-name", "same name", "warn", "GPU 2: Fake H100"),
    ],
)
def test_a_sick_gpu_of_a_fake_driver_is_named(library: Path, words: str, name: str, state: str, said: str) -> None:
    gpus = 3 if name.startswith("same") else 2
    found, _ = probed(fake_nvml.environment(library, words, gpus))
    wrong = {one["name"] for one in found.values() if one["state"] != "ok"}
    assert name in wrong, found
    assert wrong <= {name, "same ECC"}, "nothing else is accused"
    assert found[name]["state"] == state
    assert said in found[name]["value"]
    assert found[name]["remedy"], "there is something to do"


def test_fewer_gpus_than_ranks(library: Path) -> None:
    found, _ = probed(fake_nvml.environment(library), ranks_here=8)
    assert (found["count"]["state"], found["count"]["expectation"]) == ("fail", "8, one for each rank of this node")


def test_without_a_driver_one_line_says_so(library: Path) -> None:
    no_driver = fake_nvml.environment(library, "no-driver")
    for ranks_here, state in ((0, "absent"), (1, "fail")):
        found, facts = probed(no_driver, ranks_here)
        assert list(found) == ["driver"], "one line"
        assert found["driver"]["state"] == state
        assert "no NVIDIA driver answers" in found["driver"]["value"]
        assert facts == {}
