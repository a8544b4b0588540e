"""``mslm doctor`` on real gloo ranks: sound ones, and one that is really slow, badly wired or without the runs."""

from __future__ import annotations

import ctypes
import dataclasses
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_slm.config.load import load
from megatron_slm.doctor.result import Result
from tests.breadth import widely
from tests.ranks import run_ranks
from tests.runs import rank_environment

ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="network and mount namespaces are made by root alone")
CLONE_NEWNS, CLONE_NEWUTS, CLONE_NEWNET = 0x00020000, 0x04000000, 0x40000000
MS_REC, MS_PRIVATE = 0x4000, 0x40000


def examined(
    runs: str,
    *,
    slow: int | None = None,
    names: bool = False,
    network: tuple[str, str, str] | None = None,
    apart: int | None = None,
    absent: int | None = None,
    stopped: int | None = None,
    times: int = 1,
) -> list[list[Result]]:
    """One rank: become what the test wants it to be, then be examined; rank 0 returns what was found each time.

    Args:
        slow: this rank is bound to one core, on which another process computes at a higher priority.
        names: every rank is a machine of its own name.
        network: interface and address of most ranks, and the namespace in which rank 3 is.
        apart: this rank has an empty directory in the place of the runs.
        absent: this rank does not come.
        stopped: this rank is stopped (SIGSTOP) in the middle, until rank 0 has its results.
    """
    found = []
    for _ in range(times):
        environment = rank_environment()
        if names:
            namespace(CLONE_NEWUTS)
            socket.sethostname(f"node{environment.rank}")
        if network is not None:
            interface, address, name = network
            os.environ["GLOO_SOCKET_IFNAME"] = interface
            environment = dataclasses.replace(environment, master_addr=address)
            if environment.rank == 3:
                enter(f"/run/netns/{name}")
                os.environ["GLOO_SOCKET_IFNAME"] = f"{interface}x"
        if environment.rank == apart:
            namespace(CLONE_NEWNS)
            mount("none", "/", None, MS_REC | MS_PRIVATE)
            mount("tmpfs", runs, "tmpfs", 0)
        if environment.rank == slow:
            os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
            # In this session: the scheduler weighs sessions alike, whatever the priorities in them (autogroup).
            subprocess.Popen([sys.executable, "-c", f"import os\nwhile os.getppid() == {os.getpid()}: pass"])
            os.nice(10)
        from megatron_slm import run_doctor_ranks

        if absent is not None:
            run_doctor_ranks.JOIN_S = 4.0
        if stopped is not None:
            run_doctor_ranks.STAGE_S, run_doctor_ranks.SETTLE_S = 5.0, 2.0
        if environment.rank == absent:
            time.sleep(5.0)
            return []
        from megatron_slm import run_doctor_world
        from megatron_slm.run_doctor import Examination

        if environment.rank == stopped:
            run_doctor_world.examine_pace = lambda world: os.kill(os.getpid(), signal.SIGSTOP)
        pid = Path(runs, f"pid{environment.rank}")
        pid.write_text(str(os.getpid()))
        config = load(None, ("preset=tiny", f"log.runs_dir={runs}", "parallel.device=cpu")).config
        results, board = run_doctor_world.examine(environment, Examination(config, True, "cpu", quick=True))
        assert board is not None, "every rank reaches rank 0"
        if stopped is not None and environment.rank == 0:
            os.kill(int(Path(runs, f"pid{stopped}").read_text()), signal.SIGCONT)
        board.post("done", True)
        if environment.rank == 0:
            board.answers("done", 30.0, [rank for rank in range(environment.world_size) if rank != absent])
        pid.unlink(missing_ok=True)
        found.append(results)
        if times > 1:
            import torch.distributed as dist

            dist.init_process_group(
                "gloo", init_method=f"file://{runs}/again{len(found)}", rank=environment.rank, world_size=4
            )
    return found


def namespace(kind: int) -> None:
    """A namespace of this rank's own."""
    if ctypes.CDLL(None, use_errno=True).unshare(kind):
        raise OSError(ctypes.get_errno(), "unshare")


def enter(path: str) -> None:
    """Into a network namespace."""
    with Path(path).open() as stream:
        if ctypes.CDLL(None, use_errno=True).setns(stream.fileno(), CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), "setns")


def mount(source: str, target: str, kind: str | None, flags: int) -> None:
    arguments = [None if text is None else text.encode() for text in (source, target, kind)]
    if ctypes.CDLL(None, use_errno=True).mount(*arguments, flags, None):
        raise OSError(ctypes.get_errno(), "mount")


def wrong(results: list[Result], *subjects: str) -> list[str]:
    """What is no sound result of these subjects."""
    return [f"{one.name}: {one.value}" for one in results if one.subject in subjects and one.state in ("warn", "fail")]


@pytest.mark.parametrize("times", widely([1, 10], 1))
def test_sound_ranks_are_not_accused(times: int, tmp_path: Path) -> None:
    for results in run_ranks(examine_times, 4, str(tmp_path), times, timeout_s=300.0)[0]:
        accused = wrong(results, "pace", "links", "ranks", "collectives", "clocks")
        assert [one for one in accused if not one.startswith("cores: other programs")] == []
        assert {"pace", "links", "ranks", "storage", "versions"} <= {one.subject for one in results}


def examine_times(runs: str, times: int) -> list[list[Result]]:
    return examined(runs, times=times)


def test_a_rank_whose_core_is_taken_is_named(tmp_path: Path) -> None:
    (results,) = run_ranks(examine_slow, 4, str(tmp_path))[0]
    lines = [one for one in results if one.name == "matrix product"]
    assert [line.state for line in lines] == ["fail"], lines
    assert lines[0].value.startswith(f"rank 2 on {socket.gethostname()} is "), lines[0].value
    assert "of the time for a core" in lines[0].value, "the scheduler says why"


def examine_slow(runs: str) -> list[list[Result]]:
    return examined(runs, slow=2)


@pytest.fixture
def narrow_cable() -> Iterator[tuple[str, str, str]]:
    """A network namespace behind a cable of 200 Mbit/s: (interface here, its address, name of the namespace)."""
    missing = [name for name in ("ip", "tc") if shutil.which(name) is None]
    if missing or os.geteuid() != 0:
        pytest.skip(f"needs root, ip and tc (iproute2){' : no ' + missing[0] if missing else ''}")
    name = f"md{os.getpid() % 100000}"
    for command in (
        f"ip netns add {name}",
        f"ip link add {name} type veth peer name {name}x netns {name}",
        f"ip addr add 10.213.44.1/24 dev {name}",
        f"ip link set {name} up",
        f"ip -n {name} addr add 10.213.44.2/24 dev {name}x",
        f"ip -n {name} link set {name}x up",
        f"ip -n {name} link set lo up",
        f"tc -n {name} qdisc add dev {name}x root tbf rate 200mbit burst 64kb latency 400ms",
    ):
        subprocess.run(command.split(), check=True, capture_output=True)
    yield name, "10.213.44.1", name
    subprocess.run(["ip", "link", "del", name], check=False)
    subprocess.run(["ip", "netns", "del", name], check=False)


def test_a_node_behind_a_narrow_cable_is_named(narrow_cable: tuple[str, str, str], tmp_path: Path) -> None:
    (results,) = run_ranks(examine_network, 4, str(tmp_path), narrow_cable)[0]
    (line,) = [one for one in results if one.subject == "links" and one.state == "fail"]
    assert line.name == "slow node", line
    assert line.value.startswith("node3 (rank 3) is slow with every rank: 0.0"), line.value
    (sound,) = [one for one in results if one.subject == "links" and one.state == "ok"]
    assert sound.name == "between nodes", "the others are machines of their own, and are sound"
    (skew,) = [one for one in results if one.subject == "clocks"]
    assert skew.state == "ok", f"all have this machine's clock: {skew.value}"


def examine_network(runs: str, network: tuple[str, str, str]) -> list[list[Result]]:
    return examined(runs, names=True, network=network)


@ROOT
def test_a_node_that_does_not_see_the_runs_is_named(tmp_path: Path) -> None:
    (results,) = run_ranks(examine_storage, 2, str(tmp_path))[0]
    (line,) = [one for one in results if one.name == "shared"]
    assert line.state == "fail"
    assert line.host == "node1"
    assert line.value.startswith(f"node1 does not see what node0 has written to {tmp_path}"), line.value
    assert list(tmp_path.iterdir()) == [], "nothing is left behind"


def examine_storage(runs: str) -> list[list[Result]]:
    return examined(runs, names=True, apart=1)


def test_a_rank_that_does_not_come_is_named(tmp_path: Path) -> None:
    (results,) = run_ranks(examine_absent, 4, str(tmp_path))[0]
    (line,) = results
    assert line.value.startswith("rank 2 of 4 did not come within 4 s; the others are on "), line.value


def examine_absent(runs: str) -> list[list[Result]]:
    return examined(runs, absent=2)


def test_a_rank_that_is_stopped_in_the_middle_is_named_alone(tmp_path: Path) -> None:
    (results,) = run_ranks(examine_stopped, 4, str(tmp_path))[0]
    accused = wrong(results, "ranks")
    assert len(accused) == 1, accused
    assert f"rank 2 on {socket.gethostname()} gave no answer" in accused[0]


def examine_stopped(runs: str) -> list[list[Result]]:
    return examined(runs, stopped=2)


BIN = Path(sys.executable).parent
LAUNCHERS = {
    "local": [str(BIN / "mslm")],
    "torchrun": [str(BIN / "torchrun"), "--standalone", "--nproc-per-node=2", "--no-python", str(BIN / "mslm")],
    "mpirun": [str(BIN / "mpirun"), "-n", "2", str(BIN / "mslm")],
}


@pytest.mark.parametrize("launcher", widely(LAUNCHERS, "torchrun"))
def test_the_verb_under_every_launcher(launcher: str, tmp_path: Path) -> None:
    foreign = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_", "PMI_", "OMPI_", "SLURM_", "MSLM_")
    variables = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
    ranks = ["--ranks", "2"] if launcher == "local" else []
    ended = subprocess.run(
        [*LAUNCHERS[launcher], "doctor", *ranks, "--quick", "--json", "parallel.device=cpu"], cwd=tmp_path,
        env=variables, capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stdout + ended.stderr
    record = json.loads(ended.stdout)
    assert record["failures"] == 0
    found = {one["name"]: one["value"] for one in record["results"]}
    assert found["present"] == "2 rank(s) on 1 node(s)", "printed once, of both ranks"
    assert "inside a node" in found
