"""What a probe found, and how probes are run: one that breaks or hangs is a result like any other. No torch."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

State = Literal["ok", "warn", "fail", "absent"]
"""``absent``: not there and not needed, or not to be known here; the value says which."""

EXCLUDE = "leave the node out (srun --exclude, or the host list of mpirun and torchrun)"
"""The way out where a machine is slower than its like and the reason is not in this program's reach."""

NO_ANSWER = "no answer"


@dataclass(frozen=True)
class Result:
    """One line of the report.

    Attributes:
        subject: heading under which it is shown.
        name: what was looked at.
        state: see :data:`State`.
        value: what was found, with its unit.
        expectation: what it should be.
        remedy: one sentence: what to do; empty unless the state is warn or fail.
        host: the machine that it was found on; empty where it is about the job.
    """

    subject: str
    name: str
    state: State
    value: str
    expectation: str = ""
    remedy: str = ""
    host: str = ""


Probe = Callable[[], Iterable[Result]]


def run_probe(subject: str, name: str, probe: Probe, limit_s: float) -> list[Result]:
    """The results of a probe, whatever it does.

    It runs in a thread of its own: a file system that does not answer cannot be interrupted, only left behind.

    Args:
        limit_s: a probe that takes longer is given up.
    """
    found: list[Result] = []
    broken: list[BaseException] = []

    def work() -> None:
        try:
            found.extend(probe())
        except BaseException as error:  # whatever ends a probe is a result
            broken.append(error)

    thread = threading.Thread(target=work, name=f"probe {name}", daemon=True)
    thread.start()
    thread.join(limit_s)
    if thread.is_alive():
        hung = Result(subject, name, "fail", f"{NO_ANSWER} within {limit_s:g} s", "an answer", _look(name))
        return [*list(found), hung]
    if broken:
        said = f"{type(broken[0]).__name__}: {broken[0]}".strip().splitlines()[0][:200]
        return [*found, Result(subject, name, "fail", f"the probe broke: {said}", "", _look(name))]
    return found


def run_probes(probes: Mapping[tuple[str, str], Probe], limit_s: Callable[[str], float]) -> list[Result]:
    """One probe after another; of a subject that has not answered once, the rest is left out.

    Args:
        probes: (subject, name) -> probe.
        limit_s: of one probe of a subject.
    """
    found: list[Result] = []
    for (subject, name), probe in probes.items():
        if any(one.subject == subject and one.value.startswith(NO_ANSWER) for one in found):
            found.append(Result(subject, name, "absent", "not tried, as what it would ask does not answer"))
        else:
            found += run_probe(subject, name, probe, limit_s(subject))
    return found


def on_host(results: Iterable[Result], host: str) -> list[Result]:
    """The same, found on ``host``."""
    return [dataclasses.replace(result, host=host) for result in results]


def from_record(record: Mapping[str, Any]) -> Result:
    """A result that another rank has sent as JSON."""
    return Result(**record)


def _look(name: str) -> str:
    return f"Look at {name} by hand on that machine: it does not answer as a sound one does."
