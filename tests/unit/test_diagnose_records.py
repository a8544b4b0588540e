"""``mslm diagnose RUN``: what it reads, what it refuses, what it prints, and the pages it names."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_slm.cli import main
from megatron_slm.diagnose import records
from megatron_slm.diagnose.robust import change, deviation, rank_correlation
from megatron_slm.diagnose.rules import RULES, diagnose
from megatron_slm.errors import DataError

ROOT = Path(__file__).resolve().parents[2]
PARTS = ("symptom", "first checks", "knobs", "when to roll back")


def rows(count: int) -> list[dict[str, Any]]:
    """Records of steps of 8 samples whose loss falls."""
    return [
        {
            "step": step,
            "consumed_samples": 8 * step,
            "batch_size": 8,
            "lm_loss": 2.0 + 4.0 / step,
            "grad_norm": 1.0,
            "learning_rate": 1e-3,
            "sample_digest": f"{step:032x}",
        }
        for step in range(1, count + 1)
    ]


def written(directory: Path, steps: list[dict[str, Any]], **files: str) -> Path:
    """A run's directory."""
    directory.mkdir()
    (directory / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in steps))
    (directory / "config.yaml").write_text("stage: pretrain\n")
    for name, text in files.items():
        (directory / name.replace("_", ".")).write_text(text)
    return directory


def findings(run: Path, against: Path | None = None) -> dict[str, Any]:
    found = diagnose(records.read(run, against=against))
    return {finding.name: finding for finding in found.findings}


def test_a_sound_run_says_what_was_checked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = written(tmp_path / "run", rows(60))
    assert main(["diagnose", str(run)]) == 0
    text = capsys.readouterr().out
    assert "nothing found  divergence, spike, late-instability, plateau, dead-gradients, data-order" in text
    assert "not checked    forgetting: needs two validations" in text


def test_findings_have_an_exit_code_and_a_json_form(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    steps = rows(60)
    steps[40]["lm_loss"] = 30.0
    run = written(tmp_path / "run", steps)
    assert main(["diagnose", str(run), "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert [(one["name"], one["step"], one["runbook"]) for one in found["findings"]] == [
        ("spike", 41, "docs/runbooks/spike.md")
    ]
    assert "positions 320 to 327" in found["findings"][0]["evidence"][-1]
    assert set(found) == {"run", "stage", "steps", "findings", "nothing_found", "not_checked"}
    assert main(["diagnose", str(run)]) == 1
    assert "spike from step 41 on: the loss jumped and came back" in capsys.readouterr().out


def test_a_run_that_is_too_short_is_not_judged(tmp_path: Path) -> None:
    found = diagnose(records.read(written(tmp_path / "run", rows(8))))
    assert not found.findings and found.sound == ("data-order",)
    assert dict(found.unchecked)["plateau"] == "needs 20 steps with the loss, has 8"


def test_what_is_no_run_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["diagnose", str(tmp_path / "nowhere")]) == 2
    assert "holds no metrics.jsonl" in capsys.readouterr().err
    assert main(["diagnose", str(written(tmp_path / "empty", []))]) == 2
    assert "is empty" in capsys.readouterr().err
    assert main(["diagnose", str(written(tmp_path / "run", rows(3))), "--against", str(tmp_path)]) == 2


def test_a_damaged_line_is_named_and_a_torn_end_is_not(tmp_path: Path) -> None:
    run = written(tmp_path / "run", rows(30))
    lines = (run / "metrics.jsonl").read_text().splitlines()
    (run / "metrics.jsonl").write_text("\n".join([*lines, lines[-1][:40]]))
    assert len(records.read(run).steps) == 30
    (run / "metrics.jsonl").write_text("\n".join([*lines[:4], "{", *lines[5:]]))
    with pytest.raises(DataError, match=r"metrics\.jsonl:5 is no record of a step"):
        records.read(run)
    (run / "metrics.jsonl").write_text("\n".join(lines))
    (run / "config.yaml").write_text("a: [")
    with pytest.raises(DataError, match=r"config\.yaml is not YAML"):
        records.read(run)


def test_samples_that_are_left_out_or_repeated_are_named(tmp_path: Path) -> None:
    steps = rows(40)
    for row in steps[20:]:
        row["consumed_samples"] += 8
    assert "8 are left out" in findings(written(tmp_path / "gap", steps))["data-order"].evidence[0]
    for row in steps[20:]:
        row["skipped_samples"] = 8
    assert not findings(written(tmp_path / "rolled", steps)), "a roll-back has passed over them, and says so"
    steps = rows(40)
    for row in steps[20:]:
        row["consumed_samples"] -= 8
    assert "8 are repeated" in findings(written(tmp_path / "twice", steps))["data-order"].evidence[0]


def test_steps_and_digests_that_do_not_follow_are_named(tmp_path: Path) -> None:
    steps = rows(40)
    found = findings(written(tmp_path / "lost", [*steps[:10], *steps[11:]]))["data-order"]
    assert found.step == 12 and "step 10 is followed by step 12" in " ".join(found.evidence)
    steps[30]["sample_digest"] = steps[7]["sample_digest"]
    events = "2026-01-01 00:00:00\tJob ID: \t# GPUs: 1\tStarting job\tIteration: {}\n"
    run = written(tmp_path / "old", steps, progress_txt=events.format(0) + events.format(30))
    found = findings(run)["data-order"]
    assert found.step == 31 and "has the sample digest of step 8" in found.evidence[0]
    assert found.evidence[-1] == "the run was started at step 0, 30"


def test_two_runs_of_one_identity_must_read_the_same(tmp_path: Path) -> None:
    same = json.dumps({"identity": "x", "fields": {"data": 1}})
    one, other = rows(40), rows(40)
    for row in other[25:]:
        row["sample_digest"] = f"{row['step'] + 1000:032x}"
    first = written(tmp_path / "one", one, identity_json=same)
    second = written(tmp_path / "other", other, identity_json=same)
    assert findings(second, first)["data-order"].step == 26
    (second / "identity.json").write_text(json.dumps({"identity": "y", "fields": {"data": 2}}))
    assert not findings(second, first)


def test_every_rule_has_its_page_and_every_page_its_rule() -> None:
    pages = {page.stem: page.read_text(encoding="utf-8") for page in (ROOT / "docs" / "runbooks").glob("*.md")}
    assert set(pages) == {rule.name for rule in RULES}
    missing = [f"{name}: {part}" for name, text in pages.items() for part in PARTS if f"## {part}" not in text.lower()]
    assert not missing
    table = (ROOT / "docs" / "diagnose.md").read_text(encoding="utf-8")
    assert not [rule.name for rule in RULES if f"[{rule.name}](runbooks/{rule.name}.md)" not in table]


def test_diagnosing_imports_no_torch(tmp_path: Path) -> None:
    run = written(tmp_path / "run", rows(30))
    program = (
        "import sys; from megatron_slm.cli import main; code = main(['diagnose', sys.argv[1]]); "
        "sys.exit(9 if 'torch' in sys.modules else code)"
    )
    done = subprocess.run([sys.executable, "-c", program, str(run)], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr


def test_statistics_are_those_of_the_definitions() -> None:
    assert deviation([float(at) for at in range(100)]) == pytest.approx(1.4826 / 2**0.5), "a trend of one a step"
    assert change([1.0] * 5, [1.0] * 5).errors == 0.0 and change([1.0] * 5, [2.0] * 5).errors == float("inf")
    assert rank_correlation([1.0, 2.0, 3.0, 9.0], [1.0, 4.0, 5.0, 6.0]) == pytest.approx(1.0)
    assert rank_correlation([1.0, 2.0, 2.0, 3.0], [3.0, 2.0, 2.0, 1.0]) == pytest.approx(-1.0)
    assert rank_correlation([1.0, 1.0], [1.0, 2.0]) == 0.0
