"""A request to stop, noticed between steps."""

from __future__ import annotations

import signal
import types

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class StopRequest:
    """While entered, SIGTERM, SIGUSR1 and Ctrl-C only set a flag; the handlers from before come back on exit.

    Ranks started by ``mslm`` ignore Ctrl-C (their parent answers it and sends SIGTERM); it stays ignored there. The
    flag is this rank's own: the training loop must agree on it over all ranks before it stops. Main thread only, as
    ``signal.signal`` demands.
    """

    def __init__(self) -> None:
        self._received: int | None = None
        self._previous: dict[int, signal._HANDLER] = {}

    @property
    def requested(self) -> bool:
        """Whether a signal has asked this rank to stop."""
        return self._received is not None

    @property
    def signal_name(self) -> str | None:
        """Name of the first signal, such as "SIGTERM"; None without one."""
        return None if self._received is None else signal.Signals(self._received).name

    def __enter__(self) -> StopRequest:
        for number in STOP_SIGNALS:
            previous = signal.getsignal(number)
            if number == signal.SIGINT and previous is signal.SIG_IGN:
                continue
            self._previous[number] = previous
            signal.signal(number, self._record)
        return self

    def __exit__(self, *_: object) -> None:
        for number, previous in self._previous.items():
            signal.signal(number, previous)
        self._previous = {}

    def _record(self, number: int, _: types.FrameType | None) -> None:
        if self._received is None:
            self._received = number
