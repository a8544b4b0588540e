"""The newest record of a run for Prometheus: over HTTP, or in a file of node_exporter's textfile collector.

Every number of a record is a gauge ``mslm_NAME`` with the label ``run``, those of a {name: number} ``mslm_NAME_name``.
"""

from __future__ import annotations

import contextlib
import math
import re
import socket
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, start_http_server, write_to_textfile

from megatron_slm.errors import LaunchError
from megatron_slm.train.config import LogConfig

_NO_PART_OF_A_NAME = re.compile(r"[^a-zA-Z0-9_]+")


class PrometheusExport:
    """See the module. The one rank that writes the log has it.

    Args:
        log: address and port, or file.
        run: the run's name.

    Raises:
        LaunchError: the port cannot be had.
    """

    def __init__(self, log: LogConfig, run: str) -> None:
        self._run, self._file = run, log.prometheus_file
        self._registry = CollectorRegistry()
        self._gauges: dict[str, Gauge] = {}
        self._skipped = Counter(
            "mslm_skipped_updates", "updates that the guard has rejected", ["run"], registry=self._registry
        )
        self._server: Any = None
        self.places: list[str] = []
        if log.prometheus_port is not None:
            self._serve(log.prometheus_address, log.prometheus_port)
        if log.prometheus_file is not None:
            self.places.append(log.prometheus_file)

    def _serve(self, address: str, port: int) -> None:
        try:
            self._server, _ = start_http_server(port, addr=address, registry=self._registry)
        except OSError as error:
            raise LaunchError(
                f"log.prometheus_port={port} of {address} cannot be had on {socket.gethostname()} "
                f"({error.strerror or error}); choose another port, or leave it out."
            ) from error
        self.places.append(f"http://{address}:{port}/metrics on {socket.gethostname()}")

    def show(self, record: Mapping[str, Any]) -> None:
        """Let every number of a record be what is asked for next; what is not in it stays."""
        for name, value in _numbers(record, "mslm"):
            if name not in self._gauges:
                self._gauges[name] = Gauge(name, f"{name} of the newest step", ["run"], registry=self._registry)
            self._gauges[name].labels(self._run).set(value)
        self._skipped.labels(self._run).inc(int(bool(record.get("skipped"))))

    def write(self) -> None:
        """Replace the file, in one rename."""
        if self._file is not None:
            # What watches a run does not end it: the collector says by itself how old the file is.
            with contextlib.suppress(OSError):
                Path(self._file).parent.mkdir(parents=True, exist_ok=True)
                write_to_textfile(self._file, self._registry)

    def close(self) -> None:
        """Let go of the port. The file stays as the run has left it."""
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()


def _numbers(record: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, float]]:
    """Names and numbers; what is null in a record is not a number, for which Prometheus has a word."""
    for key, value in record.items():
        name = f"{prefix}_{_NO_PART_OF_A_NAME.sub('_', key)}"
        if isinstance(value, dict):
            yield from _numbers(value, name)
        elif value is None:
            yield name, math.nan
        elif isinstance(value, int | float):
            yield name, float(value)
