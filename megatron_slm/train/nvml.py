"""One GPU as its driver tells of it (NVML, through nvidia-ml-py): opening the library, and a reading of its sensors."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

UNKNOWN = math.nan

# Bits of nvmlClocksEventReason*; 0x200 and 0x400 are those of older drivers.
IDLE, APPLICATION_CLOCKS, DISPLAY_CLOCKS = 0x1, 0x2, 0x100
REASONS = {
    IDLE: "idle",
    APPLICATION_CLOCKS: "application clocks",
    0x4: "power cap",
    0x8: "hardware slowdown",
    0x10: "sync boost",
    0x20: "software thermal slowdown",
    0x40: "hardware thermal slowdown",
    0x80: "power brake",
    DISPLAY_CLOCKS: "display clocks",
    0x200: "board limit",
    0x400: "reliability",
}
HARMLESS = IDLE | APPLICATION_CLOCKS | DISPLAY_CLOCKS
"""Nobody holds the clocks down: nothing is to be done, or somebody has chosen them."""

_EVERY_LINK = 0xFFFFFFFF
_NVLINK_BYTES = ("NVML_FI_DEV_NVLINK_THROUGHPUT_DATA_TX", "NVML_FI_DEV_NVLINK_THROUGHPUT_DATA_RX")
"""In KiB since the driver was loaded, summed over the links by the scope."""
_NVLINK_ERRORS = (
    "NVML_FI_DEV_NVLINK_CRC_FLIT_ERROR_COUNT_TOTAL",
    "NVML_FI_DEV_NVLINK_CRC_DATA_ERROR_COUNT_TOTAL",
    "NVML_FI_DEV_NVLINK_REPLAY_ERROR_COUNT_TOTAL",
    "NVML_FI_DEV_NVLINK_RECOVERY_ERROR_COUNT_TOTAL",
)
_PCIE_BYTES = ("NVML_FI_DEV_PCIE_COUNT_TX_BYTES", "NVML_FI_DEV_PCIE_COUNT_RX_BYTES")


class Reading(NamedTuple):
    """What a GPU's sensors say. ``UNKNOWN`` is what this GPU, driver or binding does not tell."""

    seconds: float = UNKNOWN
    """When, on this machine's monotonic clock."""
    power_watts: float = UNKNOWN
    energy_joules: float = UNKNOWN
    """Since the driver was loaded."""
    celsius: float = UNKNOWN
    utilisation: float = UNKNOWN
    """Share of the driver's last sample in which a kernel ran, 0 to 1."""
    sm_clock_mhz: float = UNKNOWN
    memory_clock_mhz: float = UNKNOWN
    throttle_bits: float = UNKNOWN
    """A sum of keys of ``REASONS``."""
    ecc_corrected: float = UNKNOWN
    """Since the driver was loaded, as all counts of errors here."""
    ecc_uncorrected: float = UNKNOWN
    nvlink_bytes: float = UNKNOWN
    """Sent and received since the driver was loaded."""
    nvlink_errors: float = UNKNOWN
    """Checksums that were wrong, replays and recoveries of all links."""
    pcie_bytes: float = UNKNOWN
    """Sent and received since the driver was loaded."""


def opened() -> tuple[Any, str]:
    """NVML's bindings, initialised, or None and why not. What is opened is closed with ``nvmlShutdown``."""
    try:
        import pynvml as nvml

        nvml.nvmlInit()
    except ImportError:
        return None, "the module pynvml is not installed (pip install nvidia-ml-py)"
    except nvml.NVMLError as error:
        return None, f"no NVIDIA driver answers ({error})"
    return nvml, ""


def asked(question: Callable[..., Any], *arguments: Any) -> Any:
    """The answer, or None where this GPU, driver or binding does not know the question."""
    import pynvml as nvml

    try:
        return question(*arguments)
    except nvml.NVMLError:
        return None


def handle_of(nvml: Any, *, uuid: str | None, index: int) -> Any:
    """The GPU of this rank, or None where NVML does not have it.

    Args:
        uuid: as torch tells it; CUDA numbers GPUs in an order of its own, and CUDA_VISIBLE_DEVICES changes it.
        index: without ``uuid``, the number by NVML.
    """
    if uuid is not None:
        return asked(nvml.nvmlDeviceGetHandleByUUID, f"GPU-{uuid}")
    return asked(nvml.nvmlDeviceGetHandleByIndex, index)


def read(nvml: Any, handle: Any) -> Reading:
    """All sensors of a GPU, now."""
    volatile, corrected, uncorrected = (
        nvml.NVML_VOLATILE_ECC,
        nvml.NVML_MEMORY_ERROR_TYPE_CORRECTED,
        nvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED,
    )
    used = asked(nvml.nvmlDeviceGetUtilizationRates, handle)
    link_kib = _fields(nvml, handle, _NVLINK_BYTES, scope=_EVERY_LINK)
    return Reading(
        seconds=time.monotonic(),
        power_watts=_number(asked(nvml.nvmlDeviceGetPowerUsage, handle), 1e-3),
        energy_joules=_number(asked(nvml.nvmlDeviceGetTotalEnergyConsumption, handle), 1e-3),
        celsius=_number(asked(nvml.nvmlDeviceGetTemperature, handle, nvml.NVML_TEMPERATURE_GPU)),
        utilisation=_number(None if used is None else used.gpu, 1e-2),
        sm_clock_mhz=_number(asked(nvml.nvmlDeviceGetClockInfo, handle, nvml.NVML_CLOCK_SM)),
        memory_clock_mhz=_number(asked(nvml.nvmlDeviceGetClockInfo, handle, nvml.NVML_CLOCK_MEM)),
        throttle_bits=_number(asked(nvml.nvmlDeviceGetCurrentClocksThrottleReasons, handle)),
        ecc_corrected=_number(asked(nvml.nvmlDeviceGetTotalEccErrors, handle, corrected, volatile)),
        ecc_uncorrected=_number(asked(nvml.nvmlDeviceGetTotalEccErrors, handle, uncorrected, volatile)),
        nvlink_bytes=1024.0 * link_kib,
        nvlink_errors=_fields(nvml, handle, _NVLINK_ERRORS),
        pcie_bytes=_fields(nvml, handle, _PCIE_BYTES),
    )


def reasons(bits: float) -> tuple[str, ...]:
    """Names of the bits of ``Reading.throttle_bits``; none where they are unknown."""
    known = 0 if math.isnan(bits) else int(bits)
    return tuple(name for bit, name in REASONS.items() if known & bit)


def _number(answer: Any, unit: float = 1.0) -> float:
    return UNKNOWN if answer is None else float(answer) * unit


def _fields(nvml: Any, handle: Any, names: Iterable[str], *, scope: int = 0) -> float:
    """Sum of the counters that this GPU has; unknown where it has none of them."""
    asked_for = [(getattr(nvml, name), scope) for name in names if hasattr(nvml, name)]
    answers = asked(nvml.nvmlDeviceGetFieldValues, handle, asked_for) or ()
    # Whatever unsigned type a counter has, the rest of its eight bytes is zero.
    known = [float(one.value.ullVal) for one in answers if one.nvmlReturn == nvml.NVML_SUCCESS]
    return sum(known) if known else UNKNOWN
