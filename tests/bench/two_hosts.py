"""A job of two ranks on two hosts: network namespaces of this machine with a cable between them that can be cut.

What a cluster's scheduler does is done here by a few lines: one process a rank, all of them ended when one ends badly,
and ``mslm restart`` asked whether to start them again. Needs root and Debian's iproute2.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
RANKS = 2
GRACE_S = 5.0


@dataclass(frozen=True)
class Hosts:
    """Two namespaces; ``names[r]`` is rank r's, ``addresses[r]`` its address."""

    names: tuple[str, str]
    addresses: tuple[str, str]
    cable: str

    def cut(self) -> None:
        """Pull the cable."""
        _ip("-n", self.names[1], "link", "set", self.cable, "down")

    def plug(self) -> None:
        """Put it back."""
        _ip("-n", self.names[1], "link", "set", self.cable, "up")


def why_not() -> str | None:
    """What is missing for namespaces, if anything is."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    if shutil.which("ip") is None:
        return "network namespaces need iproute2 (apt-get install iproute2)"
    return None


@contextlib.contextmanager
def two_hosts() -> Iterator[Hosts]:
    """Make the namespaces; take them down at the end."""
    tag = f"m{os.getpid() % 100000}"
    names, addresses, cable = (f"{tag}a", f"{tag}b"), ("10.77.0.1", "10.77.0.2"), "cable"
    try:
        for name in names:
            _ip("netns", "add", name)
        _ip("link", "add", cable, "netns", names[0], "type", "veth", "peer", "name", cable, "netns", names[1])
        for name, address in zip(names, addresses, strict=True):
            _ip("-n", name, "addr", "add", f"{address}/24", "dev", cable)
            _ip("-n", name, "link", "set", "lo", "up")
            _ip("-n", name, "link", "set", cable, "up")
        yield Hosts((names[0], names[1]), addresses, cable)
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


@dataclass
class Job:
    """The ranks of one run, started as often as ``mslm restart`` says.

    Attributes:
        arguments: of ``mslm train``.
        run: its directory.
        outputs: where each rank's output of every start goes.
    """

    hosts: Hosts
    arguments: Sequence[str]
    run: Path
    outputs: Path
    starts: int = 0
    ranks: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def start(self) -> None:
        """Start the ranks."""
        self.starts += 1
        self.outputs.mkdir(parents=True, exist_ok=True)
        self.ranks = [self._rank(rank) for rank in range(RANKS)]

    def _rank(self, rank: int) -> subprocess.Popen[bytes]:
        variables = {
            "RANK": str(rank),
            "WORLD_SIZE": str(RANKS),
            "LOCAL_RANK": "0",
            "LOCAL_WORLD_SIZE": "1",
            "MASTER_ADDR": self.hosts.addresses[0],
            "MASTER_PORT": str(20000 + self.starts % 10000),
            "GLOO_SOCKET_IFNAME": self.hosts.cable,
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(ROOT),
        }
        # nsenter, not `ip netns exec`: that mounts another /sys, in which torch finds no processor.
        entered = ["nsenter", f"--net=/run/netns/{self.hosts.names[rank]}"]
        command = [*entered, sys.executable, "-m", "megatron_slm.cli", "train", *self.arguments]
        with self.output(rank).open("ab") as output:
            return subprocess.Popen(command, env=os.environ | variables, stdout=output, stderr=output)

    def output(self, rank: int) -> Path:
        """What a rank of the present start has said."""
        return self.outputs / f"{self.run.name}-start-{self.starts}-rank-{rank}.txt"

    def said(self) -> str:
        """What all ranks of the present start have said."""
        return "\n".join(self.output(rank).read_text(errors="replace") for rank in range(RANKS))

    def ended(self) -> bool:
        """Whether some rank has ended."""
        return any(rank.poll() is not None for rank in self.ranks)

    def settle(self) -> int:
        """As ``srun --kill-on-bad-exit``: give the others a moment, end them; the exit code of the job."""
        give_up = time.monotonic() + GRACE_S
        while any(rank.poll() is None for rank in self.ranks) and time.monotonic() < give_up:
            time.sleep(0.05)
        for rank in self.ranks:
            if rank.poll() is None:
                rank.send_signal(signal.SIGKILL)
            rank.wait()
        codes = [rank.returncode if rank.returncode >= 0 else 128 - rank.returncode for rank in self.ranks]
        return next((code for code in (2, 70, 1) if code in codes), max(codes))

    def kill(self) -> None:
        """End everything."""
        for rank in self.ranks:
            rank.send_signal(signal.SIGKILL)
            rank.wait()

    def asked(self, code: int) -> tuple[bool, str]:
        """What ``mslm restart`` says: again or not, and its sentence."""
        command = [sys.executable, "-m", "megatron_slm.cli", "restart", str(self.run), "--code", str(code)]
        done = subprocess.run(
            [*command, "--max-restarts", "100000"],
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            check=False,
        )
        return done.returncode == 0, (done.stdout + done.stderr).strip()
