"""``mslm plan calibrate`` on real gloo ranks, and a plan with what it has measured."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from megatron_slm.plan.rates import constants


def test_a_machine_is_measured_and_planned_for(tmp_path: Path) -> None:
    file = tmp_path / "rates.json"
    mslm = [sys.executable, "-m", "megatron_slm.cli", "plan"]
    measured = subprocess.run(
        [*mslm, "calibrate", "--ranks", "2", "--device", "cpu", "--output", str(file)],
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert measured.returncode == 0, measured.stderr
    record = json.loads(file.read_text())
    assert record["about"]["ranks"] == 2
    assert record["about"]["backend"] == "gloo"
    kinds = {sample["kind"] for sample in record["measured"]}
    assert kinds == {"gemm", "attention", "streaming", "op", "all_reduce", "all_gather", "reduce_scatter", "all_to_all"}
    assert set(constants()) <= set(record["rates"])
    assert record["rates"]["provenance"]["nvlink_efficiency"].startswith("measured: cpu, 2 ranks")
    assert record["rates"]["provenance"]["network_efficiency"].startswith("not measured here")
    planned = subprocess.run(
        [*mslm, "--model", "smollm2-135m", "--rates", str(file), "--global-batch-size", "8", "--json"],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert planned.returncode == 0, planned.stderr
    assert json.loads(planned.stdout)["cluster"]["gpus"] == 2
