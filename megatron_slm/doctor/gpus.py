"""GPUs as their driver tells of them (NVML): count, memory, modes, links between them. No torch, no CUDA context."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from megatron_slm.doctor.result import Result, State

SUBJECT = "gpus"
GIB = 1 << 30
TAKEN_BYTES = GIB
"""Memory that is in use on an idle GPU beyond which another program is taken to run on it."""
COMPUTE_MODES = ("default", "exclusive thread", "prohibited", "exclusive process")
NEARNESS = {
    0: "same board",
    10: "one PCIe switch",
    20: "several PCIe switches",
    30: "one host bridge",
    40: "one NUMA node",
    50: "across sockets",
}
"""NVML's nvmlGpuTopologyLevel_t."""
MAX_NVLINKS = 18
DEVICES = Path("/sys/bus/pci/devices")


def probe(ranks_here: int = 0) -> Iterator[Result]:
    """All GPUs of this machine.

    Args:
        ranks_here: CUDA ranks that are to run on it; 0 where that is not known.
    """
    try:
        import pynvml as nvml

        nvml.nvmlInit()
    except ImportError:
        remedy = "Install its bindings: pip install nvidia-ml-py."
        yield Result(SUBJECT, "driver", "warn", "the module pynvml is not installed", "nvidia-ml-py", remedy)
        return
    except nvml.NVMLError as error:
        state: State = "fail" if ranks_here else "absent"
        remedy = "Install the NVIDIA driver, or give the container its devices (--gpus all)." if ranks_here else ""
        yield Result(SUBJECT, "driver", state, f"no NVIDIA driver answers ({error})", "for CUDA ranks alone", remedy)
        return
    try:
        yield from _driver(nvml, ranks_here)
        handles = [nvml.nvmlDeviceGetHandleByIndex(index) for index in range(nvml.nvmlDeviceGetCount())]
        for index, handle in enumerate(handles):
            yield from _gpu(nvml, index, handle)
        if handles:
            yield from _alike(nvml, handles)
        if len(handles) > 1:
            yield _topology(nvml, handles)
    finally:
        nvml.nvmlShutdown()


def facts() -> dict[str, str]:
    """What must be equal on all nodes: driver, number and names of the GPUs; empty without a driver."""
    try:
        import pynvml as nvml

        nvml.nvmlInit()
    except Exception:  # no bindings or no driver: `probe` says which
        return {}
    try:
        handles = [nvml.nvmlDeviceGetHandleByIndex(index) for index in range(nvml.nvmlDeviceGetCount())]
        names = sorted({str(asked(nvml.nvmlDeviceGetName, handle)) for handle in handles})
        driver = asked(nvml.nvmlSystemGetDriverVersion)
        return {"NVIDIA driver": str(driver), "GPUs": f"{len(handles)} x {' and '.join(names) or 'none'}"}
    finally:
        nvml.nvmlShutdown()


def count() -> int:
    """GPUs that the driver has; 0 without one."""
    return int(facts().get("GPUs", "0").partition(" ")[0])


def asked(question: Callable[..., Any], *arguments: Any) -> Any:
    """The answer, or None where this GPU, driver or binding does not know the question."""
    import pynvml as nvml

    try:
        return question(*arguments)
    except (nvml.NVMLError, nvml.NVMLLibraryMismatchError):  # the second: a driver older than the bindings
        return None


def _driver(nvml: Any, ranks_here: int) -> Iterator[Result]:
    cuda = asked(nvml.nvmlSystemGetCudaDriverVersion)
    said = "" if cuda is None else f", CUDA up to {cuda // 1000}.{cuda % 1000 // 10}"
    yield Result(SUBJECT, "driver", "ok", f"{asked(nvml.nvmlSystemGetDriverVersion)}{said}")
    count = nvml.nvmlDeviceGetCount()
    if count < ranks_here:
        yield Result(
            SUBJECT,
            "count",
            "fail",
            f"{count} GPU(s)",
            f"{ranks_here}, one for each rank of this node",
            "Start as many ranks a node as it has GPUs (--ntasks-per-node, --nproc-per-node), or take other nodes.",
        )
    else:
        yield Result(SUBJECT, "count", "ok", f"{count} GPU(s)")


def _gpu(nvml: Any, index: int, handle: Any) -> Iterator[Result]:
    """One line for a GPU, and one for everything that is wrong with it."""
    name, memory = asked(nvml.nvmlDeviceGetName, handle), asked(nvml.nvmlDeviceGetMemoryInfo, handle)
    label = f"GPU {index}"
    size = "" if memory is None else f", {memory.total / GIB:.1f} GiB, {memory.used / GIB:.1f} in use"
    wrong = list(_faults(nvml, label, handle, memory))
    yield Result(SUBJECT, label, "ok", f"{name}{size}{_links(nvml, handle)}{_bus(nvml, handle)}{_numa(nvml, handle)}")
    yield from wrong


def _faults(nvml: Any, label: str, handle: Any, memory: Any) -> Iterator[Result]:
    def found(state: State, what: str, value: str, expectation: str, remedy: str) -> Result:
        return Result(SUBJECT, f"{label} {what}", state, value, expectation, remedy)

    if memory is not None and memory.used > TAKEN_BYTES:
        who = asked(nvml.nvmlDeviceGetComputeRunningProcesses, handle) or []
        pids = f" by process {', '.join(str(one.pid) for one in who)}" if who else ""
        value = f"{memory.used / GIB:.1f} GiB in use{pids}"
        yield found(
            "warn", "memory", value, "an idle GPU", "End what runs on it (nvidia-smi), or ask for a whole node."
        )
    ecc = asked(nvml.nvmlDeviceGetEccMode, handle)
    if ecc is not None and not ecc[0]:
        yield found("warn", "ECC", "off", "on", "Turn it on (nvidia-smi -e 1, then reboot): flipped bits go unseen.")
    errors = asked(
        nvml.nvmlDeviceGetTotalEccErrors,
        handle,
        nvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED,
        nvml.NVML_VOLATILE_ECC,
    )
    if errors:
        value = f"{errors} uncorrected error(s) since the driver was loaded"
        yield found("fail", "ECC errors", value, "0", "Leave the node out and have the GPU reset or replaced.")
    rows = asked(nvml.nvmlDeviceGetRemappedRows, handle)
    if rows is not None and (rows[2] or rows[3]):
        value = "a row's remapping failed" if rows[3] else "a row waits to be remapped"
        yield found("fail" if rows[3] else "warn", "memory rows", value, "none", "Have the GPU reset, or replaced.")
    mig = asked(nvml.nvmlDeviceGetMigMode, handle)
    if mig is not None and mig[0]:
        yield found("fail", "MIG", "on", "off", "Turn it off (nvidia-smi -mig 0): NCCL does not reach between slices.")
    mode = asked(nvml.nvmlDeviceGetComputeMode, handle)
    if mode == 2:
        yield found("fail", "compute mode", COMPUTE_MODES[2], "default", "Let programs in: nvidia-smi -c 0.")


def _links(nvml: Any, handle: Any) -> str:
    """NVLink: how many of the links that the GPU has are up."""
    states = [asked(nvml.nvmlDeviceGetNvLinkState, handle, link) for link in range(MAX_NVLINKS)]
    known = [state for state in states if state is not None]
    return f", NVLink {sum(known)} of {len(known)} up" if known else ""


def _bus(nvml: Any, handle: Any) -> str:
    width, most = (
        asked(question, handle)
        for question in (nvml.nvmlDeviceGetCurrPcieLinkWidth, nvml.nvmlDeviceGetMaxPcieLinkWidth)
    )
    return "" if width is None else f", PCIe x{width}" + (f" of x{most}" if most not in (None, width) else "")


def _numa(nvml: Any, handle: Any) -> str:
    """The node of memory and cores that its rank is best bound to."""
    bus = getattr(asked(nvml.nvmlDeviceGetPciInfo, handle), "busId", None)
    # NVML writes eight digits of the domain, the kernel four.
    path = DEVICES / str(bus).lower()[-12:] / "numa_node"
    node = path.read_text(encoding="utf-8").strip() if bus is not None and path.is_file() else "-1"
    return "" if node == "-1" else f", NUMA node {node}"


def _alike(nvml: Any, handles: list[Any]) -> Iterator[Result]:
    """Every GPU that differs from most of its machine in name, memory, modes or links."""
    for what, ask in (
        ("name", lambda one: asked(nvml.nvmlDeviceGetName, one)),
        ("memory", lambda one: getattr(asked(nvml.nvmlDeviceGetMemoryInfo, one), "total", None)),
        ("ECC", lambda one: asked(nvml.nvmlDeviceGetEccMode, one)),
        ("NVLink", lambda one: _links(nvml, one)),
        ("PCIe", lambda one: _bus(nvml, one)),
    ):
        answers = [ask(handle) for handle in handles]
        usual = max(answers, key=answers.count)
        odd = [f"GPU {index}: {answer}" for index, answer in enumerate(answers) if answer != usual]
        if odd:
            remedy = "Have these GPUs looked at, or leave the node out: the job runs at the pace of the slowest."
            yield Result(SUBJECT, f"same {what}", "warn", "; ".join(odd), f"{usual}, as on the others", remedy)


def _topology(nvml: Any, handles: list[Any]) -> Result:
    """How far apart any two GPUs are on the bus; NVLink is with each GPU."""
    levels: dict[str, int] = {}
    for first, handle in enumerate(handles):
        for other in handles[first + 1 :]:
            level = asked(nvml.nvmlDeviceGetTopologyCommonAncestor, handle, other)
            levels[NEARNESS.get(level, "unknown")] = levels.get(NEARNESS.get(level, "unknown"), 0) + 1
    return Result(SUBJECT, "topology", "ok", ", ".join(f"{count} pair(s): {name}" for name, count in levels.items()))
