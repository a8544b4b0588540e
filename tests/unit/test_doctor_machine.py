"""What the doctor says of one machine: versions, packages, limits, network, storage; and of probes that break."""

from __future__ import annotations

import importlib
import json
import os
import resource
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.specifiers import SpecifierSet

from megatron_slm.cli import main
from megatron_slm.doctor import gpus, limits, network, packages, report, storage, versions
from megatron_slm.doctor.result import Result, run_probe, run_probes

ROOT = Path(__file__).resolve().parents[2]
GIB = 1 << 30


def of(results: Iterator[Result] | list[Result]) -> dict[str, Result]:
    return {one.name: one for one in results}


def test_the_table_of_versions_is_what_is_tested_and_declared() -> None:
    constraints = {}
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if "==" in line:
            name, _, version = line.partition(" ;")[0].strip().partition("==")
            constraints[name.lower()] = version
    declared = (ROOT / "setup.py").read_text()
    for name, package in versions.PACKAGES.items():
        assert package.tested == constraints[name], f"{name} is tested with what constraints.txt says"
        assert package.tested in SpecifierSet(package.allowed), name
        if package.needed:
            assert f'"{name}{package.allowed}"' in declared, f"{name} is allowed as setup.py says"


def test_this_environment_is_what_is_tested() -> None:
    assert {one.state for one in versions.probe()} == {"ok"}
    local = versions.judged("torch", "2.13.0+cu130", versions.PACKAGES["torch"])
    assert local.expectation == "tested", "a local part is no other version"


@pytest.mark.parametrize(
    ("name", "version", "state", "said"),
    [
        ("torch", "2.12.0+cu130", "ok", "allowed >=2.11,<2.14"),
        ("torch", "2.10.0", "fail", "2.10.0"),
        ("torch", "2.14.0a0+gitabc", "fail", "2.14.0a0"),
        ("transformer-engine", "2.13.0", "fail", "below 2.12"),
        ("transformer-engine", "2.9.0", "ok", "2.9.0"),
        ("megatron-core", "0.19.2", "fail", "Python 3.12"),
        ("numpy", "unknown", "warn", "unknown"),
    ],
)
def test_a_version_is_tested_allowed_or_neither(name: str, version: str, state: str, said: str) -> None:
    found = versions.judged(name, version, versions.PACKAGES[name])
    assert found.state == state
    assert said in f"{found.value} {found.expectation}"
    assert bool(found.remedy) == (state != "ok"), "what is wrong has a remedy"


def installed(directory: Path, module: str, distribution: str, version: str, source: str = "") -> None:
    """A package as pip leaves it: a module, and its metadata."""
    package = directory.joinpath(*module.split("."))
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(source)
    metadata = directory / f"{distribution.replace('-', '_')}-{version}.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n")


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory of packages that this process and its children find."""
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), *sys.path]))
    importlib.invalidate_caches()
    return tmp_path


def test_an_import_that_fails_crashes_or_hangs_is_said(site: Path) -> None:
    installed(site, "sound", "sound", "1.0")
    installed(site, "failing", "failing", "1.0", "raise RuntimeError('cannot load MPI library')")
    installed(site, "crashing", "crashing", "1.0", "import os; os.abort()")
    installed(site, "hanging", "hanging", "1.0", "import time; time.sleep(60)")
    assert packages.import_problem(["sound"], 20.0) == ""
    assert packages.import_problem(["failing"], 20.0) == "RuntimeError: cannot load MPI library"
    assert packages.import_problem(["crashing"], 20.0) == "the import crashes (SIGABRT)"
    assert packages.import_problem(["hanging"], 1.0) == "the import takes longer than 1 s"


def test_an_import_is_no_rank_of_the_job(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    installed(site, "asks", "asks", "1.0", "import os; assert 'PMI_RANK' not in os.environ, 'MPI_Init would join'")
    monkeypatch.setenv("PMI_RANK", "3")
    assert packages.import_problem(["asks"], 20.0) == ""


def test_foreign_packages_under_nvidia_names_are_recognised(site: Path) -> None:
    installed(site, "apex", "apex", "0.9.10.dev0")
    installed(site, "nvidia.dali", "nvidia-dali", "0.1")
    installed(site, "pynvml_old", "pynvml", "11.5.0")
    found = of(packages.probe("cuda", imports=False))
    for name, said in (
        ("apex on PyPI", "git clone https://github.com/NVIDIA/apex"),
        ("nvidia-dali on PyPI", "pip install nvidia-dali-cuda130==2.4.0"),
        ("pynvml on PyPI", "pip uninstall pynvml"),
    ):
        assert found[name].state == "fail", found
        assert said in found[name].remedy
    assert of(packages.probe("cpu", imports=False))["apex"].state == "fail", "core takes any module of that name"


def test_a_module_named_apex_without_kernels_is_none(site: Path) -> None:
    installed(site, "apex", "nvidia-apex-python-only", "0.1")
    apex = packages.IMPORTS["apex"]
    problem = packages.import_problem([name for name in apex.modules if name != "torch"], 20.0)
    assert problem == "ModuleNotFoundError: No module named 'amp_C'"


def test_what_is_missing_comes_with_its_command() -> None:
    missing = [name for name, package in packages.IMPORTS.items() if not packages.is_there(package.module)]
    if "transformer-engine" not in missing:
        pytest.skip("Transformer Engine is installed")
    found = of(packages.probe("cpu", imports=False))
    for name in missing:
        assert found[name].state == "absent", name
        assert packages.IMPORTS[name].install in found[name].expectation
    needed = of(packages.probe("cuda", ["transformer-engine"], imports=False))["transformer-engine"]
    assert (needed.state, "transformer-engine[pytorch]==2.11.0" in needed.remedy) == ("fail", True)


def test_few_open_files_are_a_warning() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
    try:
        found = of(limits.ulimits(infiniband=False))["open files"]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert (found.state, found.value) == ("warn", "256")
    assert "ulimit -n 4096" in found.remedy


def test_infiniband_needs_locked_memory() -> None:
    limited = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0] != resource.RLIM_INFINITY
    assert of(limits.ulimits(infiniband=True))["locked memory"].state == ("fail" if limited else "ok")
    assert of(limits.ulimits(infiniband=False))["locked memory"].state == "ok"


def test_limits_of_control_groups_of_both_versions(tmp_path: Path) -> None:
    own = tmp_path / "own"
    second = tmp_path / "v2"
    (second / "job").mkdir(parents=True)
    (second / "job" / "memory.max").write_text(f"{GIB // 2}\n")
    (second / "job" / "cpu.max").write_text("50000 100000\n")
    own.write_text("0::/job\n")
    found = of(limits.control_group(second, own))
    assert found["memory of the control group"].value.startswith("0.5 of ")
    assert found["cores of the control group"].value == f"0.5 of {len(os.sched_getaffinity(0))}"
    first = tmp_path / "v1"
    for controller in ("memory", "cpu"):
        (first / controller / "job").mkdir(parents=True)
    (first / "memory" / "job" / "memory.limit_in_bytes").write_text(f"{GIB // 4}\n")
    (first / "cpu" / "job" / "cpu.cfs_quota_us").write_text("-1\n")
    (first / "cpu" / "job" / "cpu.cfs_period_us").write_text("100000\n")
    own.write_text("5:memory:/job\n4:cpu,cpuacct:/job\n0::/\n")
    found = of(limits.control_group(first, own))
    assert found["memory of the control group"].value.startswith("0.2 of ")
    assert "cores of the control group" not in found, "no quota"


def test_threads_beyond_the_cores_are_a_warning() -> None:
    own = len(os.sched_getaffinity(0))
    for text, ranks, state in (("1", own, "ok"), (str(own), 1, "ok"), (str(own), 2, "warn"), ("many", 1, "fail")):
        assert of(limits.cores({"OMP_NUM_THREADS": text}, ranks))["OMP_NUM_THREADS"].state == state, text
    assert of(limits.cores({}, 2))["OMP_NUM_THREADS"].state == "warn", "each rank would take all cores"


def test_a_port_is_free_or_taken() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        place = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(taken.getsockname()[1])}
        assert of(network.meeting_point(place))["MASTER_PORT"].state == "fail"
    assert of(network.meeting_point(place))["MASTER_PORT"].state == "ok"
    assert of(network.meeting_point({**place, "MASTER_ADDR": "192.0.2.1"}))["MASTER_PORT"].state == "absent", (
        "another's"
    )
    assert of(network.meeting_point({**place, "MASTER_PORT": "http"}))["MASTER_PORT"].state == "fail"
    assert of(network.meeting_point({}))["meeting point"].state == "absent"


def test_a_host_name_matters_to_other_nodes_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "gethostname", lambda: "localhost")
    for nodes, environ, state in ((1, {}, "ok"), (2, {}, "warn"), (2, {"GLOO_SOCKET_IFNAME": "eth0"}, "ok")):
        assert of(network.host_name(nodes, environ))["host name"].state == state, (nodes, environ)
    monkeypatch.setattr(socket, "gethostname", lambda: "no-such-host.invalid")
    for nodes, environ, state in ((1, {}, "warn"), (2, {}, "fail"), (2, {"GLOO_SOCKET_IFNAME": "eth0"}, "warn")):
        assert of(network.host_name(nodes, environ))["host name"].state == state, (nodes, environ)


def test_interfaces_that_are_named_are_there() -> None:
    for variable, value, state in (
        ("GLOO_SOCKET_IFNAME", "lo", "ok"),
        ("GLOO_SOCKET_IFNAME", "lo,ib77", "fail"),
        ("NCCL_SOCKET_IFNAME", "l", "ok"),
        ("NCCL_SOCKET_IFNAME", "=l", "fail"),
        ("NCCL_SOCKET_IFNAME", "^docker", "ok"),
    ):
        assert of(network.interfaces({variable: value}))[variable].state == state, value


def test_ports_of_infiniband(tmp_path: Path) -> None:
    assert of(network.fabric(tmp_path))["InfiniBand"].state == "absent"
    for device, state, rate in (
        ("mlx5_0", "4: ACTIVE", "400 Gb/sec (4X NDR)"),
        ("mlx5_1", "4: ACTIVE", "400 Gb/sec (4X NDR)"),
        ("mlx5_2", "4: ACTIVE", "100 Gb/sec (1X NDR)"),
        ("mlx5_3", "1: DOWN", "400 Gb/sec (4X NDR)"),
    ):
        port = tmp_path / device / "ports" / "1"
        port.mkdir(parents=True)
        for name, text in (("state", state), ("rate", rate), ("link_layer", "InfiniBand")):
            (port / name).write_text(text + "\n")
    found = of(network.fabric(tmp_path))
    assert [found[f"mlx5_{number} port 1"].state for number in range(4)] == ["ok", "ok", "warn", "warn"]
    assert found["mlx5_3 port 1"].value == "InfiniBand, DOWN, 400 Gb/sec (4X NDR)"
    assert network.facts(tmp_path)["InfiniBand"].startswith("4 port(s): 100 Gb/sec")


def test_a_place_for_runs(tmp_path: Path) -> None:
    runs = tmp_path / "not" / "made" / "yet"
    for probe in (storage.writable, storage.latency, storage.rename, storage.lock):
        assert {one.state for one in probe(runs)} == {"ok"}, probe.__name__
    assert of(storage.room(runs, 1024))["space"].state == "ok"
    assert of(storage.throughput(runs, GIB))["throughput"].value.endswith(" s")
    assert list(tmp_path.iterdir()) == [], "nothing is left behind"
    full = of(storage.room(runs, 1 << 60))["space"]
    assert (full.state, full.expectation) == ("fail", "2 checkpoints of 1073741824.00 GiB")
    assert {one.state for one in storage.writable(Path("/proc/runs"))} == {"fail"}, "nobody writes into /proc"


def test_a_file_of_another_node_is_seen_or_not(tmp_path: Path) -> None:
    import fcntl

    path = tmp_path / "nonce"
    assert storage.seen(path, "abc", patience_s=0.0) == ("No such file or directory", False)
    with path.open("w") as stream:
        stream.write("abc")
        stream.flush()
        assert storage.seen(path, "abc") == ("", False), "nobody has the lock"
        fcntl.flock(stream, fcntl.LOCK_EX)
        assert storage.seen(path, "abc") == ("", True)
        assert storage.seen(path, "other", patience_s=0.0)[0] == "there is another file of this name"
    lines = list(storage.shared(path, {"a": ("", True), "b": ("No such file", False), "c": ("", False)}, "zero"))
    assert [(line.name, line.state) for line in lines] == [("shared", "fail"), ("shared locks", "warn")]


def test_a_probe_that_breaks_or_hangs_is_a_result() -> None:
    def breaks() -> Iterator[Result]:
        yield Result("x", "before", "ok", "1")
        raise ValueError("no such thing\nand more")

    def hangs() -> Iterator[Result]:
        time.sleep(30.0)
        yield Result("x", "late", "ok", "1")

    found = run_probes({("x", "a"): breaks, ("y", "b"): hangs, ("y", "c"): breaks}, lambda subject: 0.2)
    assert [(one.name, one.state) for one in found] == [
        ("before", "ok"),
        ("a", "fail"),
        ("b", "fail"),
        ("c", "absent"),
    ]
    assert found[1].value == "the probe broke: ValueError: no such thing"
    assert found[2].value == "no answer within 0.2 s"
    assert run_probe("x", "fine", lambda: [found[0]], 1.0) == [found[0]]


def test_the_report_ends_with_what_to_do() -> None:
    results = [
        Result("limits", "files", "warn", "256", "4096", "Raise it.", "n0"),
        Result("limits", "cores", "ok", "8", host="n0"),
        Result("limits", "cores", "ok", "8", host="n1"),
        Result("gpus", "GPU 0", "fail", "sick", "sound", "Leave it out.", "n1"),
    ]
    text = report.render(results, "two nodes", 1.0)
    assert text.splitlines()[0] == "two nodes: 2 ok, 0 absent, 1 warning(s), 1 failure(s) in 1.0 s"
    assert "8 (n0; 1 more)" in text, "what is sound is said once"
    end = text[text.index("what to do") :]
    assert end.index("files on n0: 256") < end.index("Raise it.") < end.index("GPU 0 on n1: sick"), "failures last"
    record = json.loads(report.to_json(results, "two nodes", 1.0))
    assert (record["failures"], record["warnings"], len(record["results"])) == (1, 1, 4)


def doctor(*tokens: str) -> int:
    return main(["doctor", "--quick", *tokens])


def test_the_verb_and_its_exit_codes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "PMI_RANK", "SLURM_STEP_ID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    assert doctor("--json") == 0
    record = json.loads(capsys.readouterr().out)
    assert {one["subject"] for one in record["results"]} >= {"versions", "packages", "gpus", "limits", "storage"}
    job = ("--preset", "llama3-8b", "parallel.world_size=64", "parallel.device=cpu", f"log.runs_dir={tmp_path}")
    assert doctor(*job) in (0, 1), "1 if this disk has no room for two such checkpoints"
    said = capsys.readouterr().out
    assert "the job has 64, and they are not started here" in said
    assert "2 checkpoints of 119.66 GiB" in said, "8,030,261,248 parameters, 4 + 12 bytes each"
    if gpus.count() == 0:
        assert doctor("parallel.device=cuda", "parallel.tensor_model_parallel_size=2") == 1, "no GPU is here"
        assert "no NVIDIA driver answers" in capsys.readouterr().out
    assert doctor("log.runs_dir=/proc/runs") == 1
    assert "do        Make it writable" in capsys.readouterr().out
    assert doctor("parallel.tensor_model_parallel_size=3") == 2
    assert doctor("--ranks", "0") == 2
