"""Runs a program that nobody trusts, and its tests, in a process of its own under limits.

The limits are those of ``sandboxed.py``, which is that process: see there what holds where. What a program of another
will to break out can do is what its user may do on this machine: run models you do not trust in a container.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

START_S = 20.0
"""What starting the interpreter and cleaning up may take on a busy machine."""


@dataclass(frozen=True)
class Limits:
    """Of a program and all of its processes together in time, of each of them in memory.

    Attributes:
        wall_s: from its start to its end; of processor time each process may take as much.
        memory_bytes: of address space.
        processes: threads included.
        file_bytes: of each file it writes.
        open_files: at a time.
    """

    wall_s: float = 4.0
    memory_bytes: int = 512 * 2**20
    processes: int = 16
    file_bytes: int = 16 * 2**20
    open_files: int = 64


class Verdict(NamedTuple):
    """Whether the tests have passed, and if not, the first reason in a few words."""

    passed: bool
    cause: str = ""


def run_tests(program: str, tests: str, limits: Limits = Limits()) -> Verdict:
    """Run ``program`` and then ``tests`` in one namespace; they pass where neither raises or ends the process.

    The process and everything it has started are gone when this returns.

    Raises:
        RuntimeError: the sandbox itself could not be made.
    """
    proof = secrets.token_hex(16)
    job = {"program": program, "tests": tests, "proof": proof, **asdict(limits)}
    with tempfile.TemporaryDirectory(prefix="sandbox-", ignore_cleanup_errors=True) as home:
        # Its own session: what is sent to our group is not for it, and the other way round.
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-B", str(Path(__file__).with_name("sandboxed.py")), str(os.getpid())],
            cwd=home,
            env={"PATH": os.environ.get("PATH", os.defpath), "HOME": home, "TMPDIR": home, "LANG": "C.UTF-8"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        try:
            said, complaint = process.communicate(json.dumps(job).encode(), timeout=limits.wall_s + START_S)
        except subprocess.TimeoutExpired:
            said, complaint = b"", b"no answer"
        finally:
            process.terminate()  # it ends what it has started
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(START_S)
            process.kill()
            process.wait()
    try:
        found = json.loads(said)
        return Verdict(found["proof"] == proof, str(found["cause"]))
    except (ValueError, KeyError, TypeError) as error:
        raise RuntimeError(f"the sandbox could not be made: {complaint[-300:].decode(errors='replace')}") from error
