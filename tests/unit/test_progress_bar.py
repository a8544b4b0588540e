"""The bar is drawn on a terminal alone, beside the lines and not into them."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
import termios
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = """
import sys
from pathlib import Path
from megatron_slm.train.console import Console

console = Console(Path(sys.argv[1]), train_iters=4, step=1, progress_bar=sys.argv[2] == "on")
console.advance(loss=3.25, tokens_per_second=12345.0)
console.say("a line of the run")
console.advance(loss=3.125, tokens_per_second=54321.0)
console.close()
"""


def drawn(log: Path, switch: str) -> tuple[str, str]:
    """(standard output, what a terminal of 100 columns on standard error was sent)."""
    terminal, standard_error = pty.openpty()
    try:
        termios.tcsetwinsize(standard_error, (24, 100))
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM, str(log), switch],
            stdout=subprocess.PIPE,
            stderr=standard_error,
            text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            check=True,
        )
        # Something is always there to read, so that the read returns.
        os.write(standard_error, b"end")
        return done.stdout, os.read(terminal, 1 << 16).decode()
    finally:
        os.close(standard_error)
        os.close(terminal)


@pytest.mark.skipif(not hasattr(termios, "tcsetwinsize"), reason="termios.tcsetwinsize came with Python 3.11")
def test_a_terminal_shows_step_loss_and_speed(tmp_path: Path) -> None:
    lines, bar = drawn(tmp_path / "log.txt", "on")
    assert "3/4" in bar and "loss 3.1250, 54,321 tokens/s" in bar
    assert lines.strip() == "a line of the run" and (tmp_path / "log.txt").read_text() == "a line of the run\n"


@pytest.mark.skipif(not hasattr(termios, "tcsetwinsize"), reason="termios.tcsetwinsize came with Python 3.11")
def test_it_can_be_switched_off(tmp_path: Path) -> None:
    assert drawn(tmp_path / "log.txt", "off") == ("a line of the run\n", "end")
