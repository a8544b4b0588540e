"""Watches ranks until they end, ends the others when one dies, and says which one it was."""

from __future__ import annotations

import os
import signal
import sys
import time
import types
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from megatron_slm.errors import EXIT_HUNG
from megatron_slm.launch import report
from megatron_slm.launch.signals import STOP_SIGNALS

EXIT_REFUSED, EXIT_STOPPED = 2, 75

POLL_S = 0.02
# After a first failure, how long the others may tell theirs: the true cause is not always the first to arrive.
SETTLE_S = 0.5
# While only lost connections are reported: the rank that closed them may still be on its way out.
CONSEQUENCE_SETTLE_S = 3.0
# After a rank came back with an error code of its own accord: its peers usually do the same.
RETURN_SETTLE_S = 5.0
GRACE_S = 3.0
_UNKILLABLE_S = 1.0

# What a rank says when it lost a peer: never the cause while another rank has a reason of its own.
_CONSEQUENCES = (
    "connection closed by peer",
    "connection reset by peer",
    "connection refused",
    "connection was likely closed",
    "broken pipe",
    "remote process exited",
    "socket timeout",
    "communicator was aborted",
    "timed out waiting",
    "wait timeout",
)


class StopSignals:
    """While entered, the first SIGTERM, SIGUSR1 or Ctrl-C is remembered; a second Ctrl-C raises KeyboardInterrupt."""

    def __init__(self) -> None:
        self.received: int | None = None
        self._interrupts = 0
        self._previous: dict[int, signal._HANDLER] = {}

    def __enter__(self) -> StopSignals:
        for number in STOP_SIGNALS:
            self._previous[number] = signal.signal(number, self._record)
        # Ignored, it would make the kernel throw away how each rank ended.
        self._previous[signal.SIGCHLD] = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        return self

    def __exit__(self, *_: object) -> None:
        for number, previous in self._previous.items():
            # None stands for a handler that was not installed from Python and cannot be put back.
            signal.signal(number, signal.SIG_DFL if previous is None else previous)

    @property
    def name(self) -> str:
        """Name of the first signal."""
        assert self.received is not None, "a stop signal has a name only after it was received"
        return signal.Signals(self.received).name

    def _record(self, number: int, _: types.FrameType | None) -> None:
        if number == signal.SIGINT:
            self._interrupts += 1
            if self._interrupts == 2:
                raise KeyboardInterrupt
        if self.received is None:
            self.received = number
            again = "; Ctrl-C again kills them at once" if number == signal.SIGINT else ""
            # print() is not safe in a signal handler that interrupts another print().
            text = f"\nmslm: {self.name}: the ranks finish their step, save and stop{again}\n"
            os.write(2, text.encode())


@dataclass(frozen=True)
class Failure:
    """Why one rank did not end well. ``signal`` killed it, or the process ended with ``exit_code``, without a word."""

    rank: int
    at_s: float
    kind: Literal["raised", "refused", "returned", "vanished"]
    code: int
    message: str
    traceback: str = ""
    signal: int | None = None
    exit_code: int | None = None

    @property
    def is_consequence(self) -> bool:
        """Whether this rank only suffered from another's end."""
        said = f"{self.message}\n{self.traceback}".lower()
        return self.signal == signal.SIGABRT or any(words in said for words in _CONSEQUENCES)


@dataclass
class RankProcess:
    """One started rank: its process, the pipe its report comes through, and how it ended."""

    rank: int
    pid: int
    pipe: int
    received: bytearray = field(default_factory=bytearray)
    report: report.Report | None = None
    exit_code: int | None = None
    ended_at_s: float = 0.0

    @property
    def alive(self) -> bool:
        """Whether the process has not been waited for yet."""
        return self.exit_code is None

    def poll(self) -> None:
        """Take what the rank wrote, and notice its end."""
        self._drain()
        if self.alive:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid == self.pid:
                self.exit_code = os.waitstatus_to_exitcode(status)
                self.ended_at_s = time.monotonic()
                self._drain()
        if self.report is None:
            self.report = report.from_bytes(bytes(self.received))

    def _drain(self) -> None:
        try:
            while block := os.read(self.pipe, 65536):
                self.received += block
        except BlockingIOError:
            return

    def kill(self, number: int) -> None:
        """Send a signal, if the process has not been waited for: its number may be another's after that."""
        if self.alive:
            os.kill(self.pid, number)

    def failure(self) -> Failure | None:
        """Why the rank failed, as far as is known now; None while it works or when it ended well."""
        if self.report is not None:
            ended = self.report
            if ended.kind == "returned" and ended.code in (0, EXIT_STOPPED):
                return None
            message = ended.message or f"ended with exit code {ended.code}"
            return Failure(self.rank, ended.at_s, ended.kind, ended.code, message, ended.traceback)
        if self.exit_code is None:
            return None
        crash_stack = self.received.decode(errors="replace").strip()
        number = -self.exit_code if self.exit_code < 0 else None
        how = _how(self.exit_code)
        return Failure(self.rank, self.ended_at_s, "vanished", 1, how, crash_stack, number, self.exit_code)


def _how(exit_code: int) -> str:
    if exit_code >= 0:
        return f"exited with code {exit_code} in the middle of its work (os._exit, or a library's exit)"
    number = -exit_code
    name = signal.Signals(number).name if number in set(signal.Signals) else "a real-time signal"
    hint = ": out of memory? (dmesg or the job's memory limit tells)" if number == signal.SIGKILL else ""
    return f"killed by signal {number} ({name}){hint}"


def supervise(ranks: Sequence[RankProcess], stop: StopSignals) -> tuple[int, str]:
    """Wait for all ranks; returns the exit code of the run and why it is not 0, said on standard error.

    When one rank fails the others are ended, within 10 s of it. Raises KeyboardInterrupt at a second Ctrl-C.
    """
    forwarded = False
    noticed_at_s: float | None = None
    while any(rank.alive for rank in ranks):
        for rank in ranks:
            rank.poll()
        if stop.received is not None and not forwarded:
            forwarded = True
            for rank in ranks:
                rank.kill(signal.SIGTERM)
        failures = [failure for rank in ranks if (failure := rank.failure()) is not None]
        if failures:
            noticed_at_s = noticed_at_s or time.monotonic()
            if time.monotonic() > noticed_at_s + _patience_s(failures):
                break
        time.sleep(POLL_S)
    # Judged before the others are ended: what they say while they die is no cause.
    failures = [failure for rank in ranks if (failure := rank.failure()) is not None]
    # Beside a refusal the others have nothing to save, and would print torch's stack where they wait for each other.
    refused = any(failure.kind == "refused" and failure.code == EXIT_REFUSED for failure in failures)
    end(ranks, grace_s=0.0 if refused else GRACE_S)
    code, said = _verdict(ranks, failures, stop)
    if said:
        _say(said)
    return code, said


def _patience_s(failures: Sequence[Failure]) -> float:
    if all(failure.kind == "returned" for failure in failures):
        return RETURN_SETTLE_S
    return CONSEQUENCE_SETTLE_S if all(failure.is_consequence for failure in failures) else SETTLE_S


def end(ranks: Sequence[RankProcess], *, grace_s: float) -> None:
    """SIGTERM, after ``grace_s`` SIGKILL; then no rank is left, not even as a zombie."""
    give_up_at_s = time.monotonic() + grace_s
    for number, until_s in ((signal.SIGTERM, give_up_at_s), (signal.SIGKILL, give_up_at_s + _UNKILLABLE_S)):
        if number == signal.SIGTERM and grace_s == 0:
            continue
        for rank in ranks:
            rank.kill(number)
        while any(rank.alive for rank in ranks) and time.monotonic() < until_s:
            for rank in ranks:
                rank.poll()
            time.sleep(POLL_S)
    for rank in ranks:
        if rank.alive:
            _say(
                f"rank {rank.rank} (process {rank.pid}) does not die from SIGKILL: it waits for a device or file system"
            )


def _verdict(ranks: Sequence[RankProcess], failures: Sequence[Failure], stop: StopSignals) -> tuple[int, str]:
    """The exit code of the run, and what is to be said about it."""
    if not failures:
        codes = {rank.report.code for rank in ranks if rank.report is not None}
        if len(codes) == 1:
            return codes.pop(), ""
        each = ", ".join(f"rank {rank.rank}: {rank.report.code}" for rank in ranks if rank.report is not None)
        return 1, f"the ranks disagree about how the run ended (exit codes {each})"
    culprit = min(failures, key=lambda failure: (failure.is_consequence, failure.kind == "returned", failure.at_s))
    if culprit.exit_code == EXIT_HUNG:
        return 1, "the watchdog has ended the run, as said above"
    if culprit.kind == "refused":
        messages = {failure.message: None for failure in failures if failure.kind == "refused"}
        return culprit.code, "\n".join(messages)
    who = f"rank {culprit.rank} of {len(ranks)}"
    if culprit.kind == "returned":
        alone = f"{who} ended with exit code {culprit.code}; the others did not follow and were ended"
        return culprit.code, alone if len(failures) < len(ranks) else ""
    if stop.received is not None and culprit.signal == signal.SIGTERM:
        nothing = f"stopped by {stop.name} outside the training loop ({who} had nothing to finish)"
        return EXIT_STOPPED, f"{nothing}; what was saved is kept"
    return 1, f"{who} died: {culprit.message}" + (f"\n{culprit.traceback}" if culprit.traceback else "")


def _say(text: str) -> None:
    print(f"mslm: {text}", file=sys.stderr, flush=True)
