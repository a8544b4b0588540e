"""Network of this machine: its name, the port where ranks meet, chosen interfaces, InfiniBand and RoCE. No torch."""

from __future__ import annotations

import errno
import socket
from collections.abc import Iterator, Mapping
from pathlib import Path

from megatron_slm.doctor.result import Result

SUBJECT = "network"
INFINIBAND = Path("/sys/class/infiniband")
INTERFACE_VARIABLES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")


def host_name(nodes: int, environ: Mapping[str, str]) -> Iterator[Result]:
    """What this machine's own name resolves to: gloo and Open MPI listen there where no interface is named.

    Args:
        nodes: machines of the job.
    """
    name = socket.gethostname()
    # Where an interface is named, gloo takes its address and no name.
    matters = nodes > 1 and not environ.get("GLOO_SOCKET_IFNAME")
    expected = "an address that the other nodes reach" if matters else "any address"
    try:
        found = sorted({str(entry[4][0]) for entry in socket.getaddrinfo(name, None)})
    except OSError as error:
        remedy = "Enter it in /etc/hosts or the name service, or set GLOO_SOCKET_IFNAME to an interface."
        value = f"{name} does not resolve ({error.strerror})"
        yield Result(SUBJECT, "host name", "fail" if matters else "warn", value, expected, remedy)
        return
    value = f"{name} is {', '.join(found)}"
    if matters and all(address.startswith("127.") or address == "::1" for address in found):
        remedy = "Set GLOO_SOCKET_IFNAME (and NCCL_SOCKET_IFNAME) to the interface of the network between the nodes."
        yield Result(SUBJECT, "host name", "warn", f"{value}: this machine alone", expected, remedy)
    else:
        yield Result(SUBJECT, "host name", "ok", value, expected)


def meeting_point(environ: Mapping[str, str]) -> Iterator[Result]:
    """MASTER_ADDR resolves, and MASTER_PORT is free where it is this machine's. For a job that has not started."""
    address, port = environ.get("MASTER_ADDR"), environ.get("MASTER_PORT")
    if not address or not port:
        yield Result(SUBJECT, "meeting point", "absent", "MASTER_ADDR and MASTER_PORT are not set: the launcher's task")
        return
    if not port.isdecimal() or not 0 < int(port) < 65536:
        yield Result(SUBJECT, "MASTER_PORT", "fail", port, "1 to 65535", "Set MASTER_PORT to a port number.")
        return
    try:
        resolved = socket.gethostbyname(address)
    except OSError as error:
        remedy = "Set MASTER_ADDR to the address of the node of rank 0."
        yield Result(SUBJECT, "MASTER_ADDR", "fail", f"{address} ({error.strerror})", "a name that resolves", remedy)
        return
    yield _port(resolved, int(port))


def _port(address: str, port: int) -> Result:
    with socket.socket() as probe:
        # As torch's store does: a connection of the last job in TIME_WAIT does not hold the port.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((address, port))
            probe.listen(1)
        except OSError as error:
            if error.errno == errno.EADDRNOTAVAIL:
                value = f"{address}:{port} is another machine's"
                return Result(SUBJECT, "MASTER_PORT", "absent", value, "free there")
            remedy = "Choose another MASTER_PORT, or end the program that listens there (ss -ltnp)."
            return Result(SUBJECT, "MASTER_PORT", "fail", f"{address}:{port}: {error.strerror}", "free", remedy)
    return Result(SUBJECT, "MASTER_PORT", "ok", f"{address}:{port} is free")


def interfaces(environ: Mapping[str, str]) -> Iterator[Result]:
    """The interfaces that the variables of gloo and NCCL name exist."""
    here = [name for _, name in socket.if_nameindex()]
    for variable in INTERFACE_VARIABLES:
        value = environ.get(variable)
        if not value:
            yield Result(SUBJECT, variable, "absent", f"not set; interfaces are {', '.join(here)}")
        elif missing := _missing(variable, value, here):
            remedy = f"Set {variable} to one of {', '.join(here)}."
            yield Result(SUBJECT, variable, "fail", f"{value}: no {', '.join(missing)} here", "interfaces", remedy)
        else:
            yield Result(SUBJECT, variable, "ok", value)


def _missing(variable: str, value: str, here: list[str]) -> list[str]:
    """NCCL takes beginnings of names, ``=`` for whole ones and ``^`` for those to leave out; gloo whole names."""
    if variable.startswith("NCCL"):
        if value.startswith("^"):
            return []
        whole = value.startswith("=")
        named = [part.partition(":")[0] for part in value.lstrip("=").split(",")]
        return [one for one in named if not any(name == one if whole else name.startswith(one) for name in here)]
    return [one for one in value.split(",") if one not in here]


def fabric(root: Path = INFINIBAND) -> Iterator[Result]:
    """Every port of an InfiniBand or RoCE device, by what the kernel says of it.

    Args:
        root: where the kernel lists them.
    """
    ports = sorted(root.glob("*/ports/*"))
    if not ports:
        yield Result(SUBJECT, "InfiniBand", "absent", "no InfiniBand or RoCE device here")
        return
    rates = [_line(port / "rate") for port in ports]
    usual = max(rates, key=rates.count)
    for port, rate in zip(ports, rates, strict=True):
        device, state = port.parent.parent.name, _line(port / "state").partition(":")[2].strip() or "unknown"
        kind = _line(port / "link_layer")
        value, name = f"{kind}, {state}, {rate}", f"{device} port {port.name}"
        if state != "ACTIVE":
            remedy = "Have its cable and switch port looked at; NCCL_IB_HCA leaves it out."
            yield Result(SUBJECT, name, "warn", value, "ACTIVE", remedy)
        elif rate != usual:
            remedy = "Have its cable looked at: the link came up at another rate than the others."
            yield Result(SUBJECT, name, "warn", value, usual, remedy)
        else:
            yield Result(SUBJECT, name, "ok", value)


def facts(root: Path = INFINIBAND) -> dict[str, str]:
    """What must be equal on all nodes."""
    rates = sorted(_line(port / "rate") for port in root.glob("*/ports/*"))
    return {"InfiniBand": f"{len(rates)} port(s): {', '.join(sorted(set(rates))) or 'none'}"}


def _line(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8").strip()
    except OSError:
        return "unknown"
