"""What gloo, NCCL and torch's store say when a peer or the network is lost, in one sentence. No torch."""

from __future__ import annotations

import re

_ADDRESS = r"\[?(?P<peer>[0-9a-fA-F.:]+|[\w.-]+)\]?(?::\d+)?"
_KNOWN: tuple[tuple[str, str], ...] = (
    (
        rf"connection (?:closed|reset) by peer(?: {_ADDRESS})?",
        "connection closed by peer{peer}: its rank has ended, or the network to it was lost",
    ),
    (
        r"timed out waiting (?P<ms>\d+)ms|wait timeout after (?P<ms2>\d+)ms|wait timeout",
        "timed out waiting{seconds} for another rank: it stands still, or the network to it is lost "
        "(parallel.distributed_timeout_minutes is the limit)",
    ),
    (
        r"watchdog caught collective operation timeout.*?optype=(?P<operation>\w+).*?timeout\(ms\)=(?P<ms>\d+)",
        "{operation} of NCCL timed out waiting{seconds}: a rank stands still, or the network to it is lost",
    ),
    (
        r"(?P<joined>\d+/\d+) clients joined",
        "only {joined} ranks came to the meeting point: the others did not start, or MASTER_ADDR and MASTER_PORT do "
        "not lead there from their machines",
    ),
    (
        r"client socket has timed out after (?P<ms>\d+)ms while trying to connect to \((?P<peer>[^,)]+), (?P<port>\d+)",
        "nobody answered at {peer} port {port}{seconds}: rank 0 did not start, or MASTER_ADDR and MASTER_PORT do not "
        "lead to it from here",
    ),
    (
        r"remote process exited or there was a network error|ncclremoteerror|ncclsystemerror",
        "NCCL says that a remote process exited or the network failed; the log of NCCL_DEBUG=WARN names the link",
    ),
    (r"broken pipe|connection refused|connection was likely closed|no route to host|network is unreachable", "{said}"),
)
_LOST = ("RuntimeError", "DistBackendError", "DistNetworkError", "DistStoreError", "DistError", "ConnectionError")


def lost_peer(error: BaseException) -> str | None:
    """Why an exchange between ranks has ended; None for an error of another kind."""
    if not {base.__name__ for base in type(error).__mro__} & set(_LOST):
        return None
    text = str(error)
    for pattern, sentence in _KNOWN:
        found = re.search(pattern, text, re.IGNORECASE | re.DOTALL)
        if found is not None:
            return sentence.format(**_fields(found), said=found[0].lower())
    return None


def _fields(found: re.Match[str]) -> dict[str, str]:
    values = {name: value for name, value in found.groupdict().items() if value is not None}
    milliseconds = values.get("ms") or values.get("ms2")
    return {
        **dict.fromkeys(("operation", "joined", "port"), ""),
        **values,
        "peer": _peer(found, values.get("peer")),
        "seconds": f" for {int(milliseconds) / 1000:g} s" if milliseconds else "",
    }


def _peer(found: re.Match[str], peer: str | None) -> str:
    if peer is None:
        return ""
    return f" {peer}" if "connection" in found[0].lower() else peer
