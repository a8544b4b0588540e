"""A save that is killed at any of its file operations leaves the tracker on a whole checkpoint.

The random kills of ``test_publish.py`` may miss a narrow window; these go through every one of them.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_slm.train import manifest, publish

# Publishes step 100, then the given step, and is killed at the n-th file operation of the second save.
SAVER = """
import os, signal, sys
from pathlib import Path
from megatron_slm.train import manifest, publish

OPERATIONS = {"open", "os.rename", "os.remove", "os.rmdir", "os.mkdir"}
directory, second_step, kill_at = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
seen, counting = 0, False

def count(event, arguments):
    global seen
    if counting and event in OPERATIONS:
        seen += 1
        if seen == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

sys.addaudithook(count)
for save, step in enumerate((100, second_step)):
    counting = save == 1
    temporary = publish.begin(directory, step)
    for name in manifest.REQUIRED:
        (temporary / name).touch()
    (temporary / "payload").write_text(f"save {save}")
    publish.publish(temporary, publish.checkpoint_path(directory, step))
print(seen)
"""


def run_saver(directory: Path, second_step: int, kill_at: int) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    command = [sys.executable, "-c", SAVER, str(directory), str(second_step), str(kill_at)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False, timeout=60)


def payload_under_the_tracker(checkpoints: Path) -> str:
    newest = publish.latest(checkpoints)
    assert newest is not None, "a checkpoint had been published before the kill"
    manifest.verify(newest)
    return (newest / "payload").read_text()


@pytest.mark.parametrize("second_step", [100, 150], ids=["the same step again", "the next step"])
def test_every_file_operation(tmp_path: Path, second_step: int) -> None:
    whole = run_saver(tmp_path / "whole", second_step, 1_000_000)
    assert whole.returncode == 0, whole.stderr
    operations = int(whole.stdout)
    assert operations > 10, "a save opens, renames and removes more than this: the audit hook has seen nothing"
    survivors = []
    for kill_at in range(1, operations + 1):
        checkpoints = tmp_path / str(kill_at)
        killed = run_saver(checkpoints, second_step, kill_at)
        assert killed.returncode == -9, killed.stderr
        survivors.append(payload_under_the_tracker(checkpoints))
        # The next save tidies up without touching what it must not, and works.
        temporary = publish.begin(checkpoints, 200)
        assert payload_under_the_tracker(checkpoints) == survivors[-1]
        for name in manifest.REQUIRED:
            (temporary / name).touch()
        (temporary / "payload").write_text("after the kill")
        publish.publish(temporary, publish.checkpoint_path(checkpoints, 200))
        assert payload_under_the_tracker(checkpoints) == "after the kill"
        hidden = [entry.name for entry in checkpoints.iterdir() if entry.name.startswith(".")]
        assert hidden == [], "nothing is left of the killed save"
        for entry in checkpoints.glob("iter_*"):
            manifest.verify(entry)
    replaced = survivors.index("save 1")
    assert survivors == ["save 0"] * replaced + ["save 1"] * (operations - replaced)
    assert 0 < replaced < operations, "the kills fall on both sides of the moment of publishing"
