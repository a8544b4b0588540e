"""Starts the jobs of one verification, each in forked ranks of its own, and remembers where each has left what.

No torch: what needs it is imported when core has been fitted to the CPU, once, in the parent of all ranks.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import itertools
import math
import pickle
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_slm.config.run_config import RunConfig
from megatron_slm.errors import ConfigError
from megatron_slm.launch.environment import RankEnvironment
from megatron_slm.launch.local import run_local
from megatron_slm.launch.supervise import EXIT_STOPPED
from megatron_slm.verify import setting
from megatron_slm.verify.report import Claim

Plant = Callable[[], None]
RUNS = "the job runs"
"""The claim that stands alone where the ranks break down."""


class JobFailed(Exception):
    """The ranks of a job did not end well; the message is the launcher's report."""


def preload() -> None:
    """Import torch, core and the ranks' own modules, for every rank of every job at once."""
    from megatron_slm.parallel import device

    device.preload("cpu")
    import torch._dynamo  # noqa: F401  every rank's first optimizer would import it

    import megatron_slm.verify.ranks  # noqa: F401


@dataclass
class Jobs:
    """The jobs of one verification.

    Args:
        directory: for what they leave.
        plant: called on every rank of the jobs under test before anything is built.
    """

    directory: Path
    plant: Plant | None
    _numbers: itertools.count[int] = field(default_factory=itertools.count)
    _references: dict[str, Path] = field(default_factory=dict)

    def claims(self, run: RunConfig, *, exact: bool, quietly: bool = False) -> list[Claim]:
        """Every claim about ``run`` in float64, or in its own precision, where its checkpoint is read again too.

        Args:
            quietly: a job that breaks down says nothing on standard error.
        """
        config = setting.compared(run, exact=exact)
        precision = setting.own_precision(config)
        reference = self.reference(config)
        saved = None if exact else self._place("checkpoints")
        try:
            found = self.parallel(config, save_to=saved, quietly=quietly)
        except JobFailed as failed:
            return [Claim(RUNS, precision, False, math.inf, 0.0, str(failed).partition("\n")[0])]
        reader = setting.one_rank(config, distributed_optimizer=config.parallel.use_distributed_optimizer)

        def work(environment: RankEnvironment) -> list[Claim]:
            from megatron_slm.verify import ranks

            return ranks.compared(reader, environment, reference, found, saved, precision=precision)

        answer: list[Claim] = self._answer(work)
        return answer

    def first_difference(self, run: RunConfig, rows: list[Claim], *, exact: bool) -> tuple[str, str] | None:
        """(module, in what) where a run with failed claims first differs; None where it breaks down."""
        config = setting.compared(run, exact=exact)
        precision = setting.own_precision(config)
        judged = [row for row in rows if row.precision == precision]
        reference = self.reference(config, watch=True)
        try:
            found = self.parallel(config, watch=True, quietly=True)
        except JobFailed:
            return None

        def work(environment: RankEnvironment) -> tuple[str, str] | None:
            from megatron_slm.verify import ranks

            return ranks.diagnosed(judged, reference, found, precision=precision, gated=config.model.swiglu)

        answer: tuple[str, str] | None = self._answer(work)
        return answer

    def reference(self, config: RunConfig, *, watch: bool = False) -> Path:
        """Where the one-rank job of the same model and batch has left its outcomes; it runs once."""
        alone = setting.one_rank(config)
        key = hashlib.blake2b(repr((alone, watch)).encode(), digest_size=16).hexdigest()
        if key not in self._references:
            place = self._place("reference")

            def entry(environment: RankEnvironment) -> int:
                from megatron_slm.verify import ranks

                return ranks.be_reference(alone, environment, place, watch=watch)

            try:
                self._run(1, entry, quietly=True)
            except JobFailed as failed:
                raise ConfigError(f"one rank alone cannot run this, so nothing is compared: {failed}") from None
            self._references[key] = place
        return self._references[key]

    def parallel(
        self, config: RunConfig, *, save_to: Path | None = None, watch: bool = False, quietly: bool = False
    ) -> Path:
        """Where the ranks of the job under test have left their outcomes.

        Raises:
            JobFailed: they did not end well.
        """
        place = self._place("job")

        def entry(environment: RankEnvironment) -> int:
            from megatron_slm.verify import ranks

            return ranks.be_parallel(config, environment, place, save_to=save_to, watch=watch, plant=self.plant)

        self._run(setting.world_size(config), entry, quietly=quietly)
        return place

    def _answer(self, work: Callable[[RankEnvironment], Any]) -> Any:
        """What ``work`` returns in a rank of its own."""
        place = self._place("answer")

        def entry(environment: RankEnvironment) -> int:
            place.write_bytes(pickle.dumps(work(environment)))
            return 0

        self._run(1, entry, quietly=False)
        return pickle.loads(place.read_bytes())

    def _run(self, world_size: int, entry: Callable[[RankEnvironment], int], *, quietly: bool) -> None:
        """Start ranks and wait for them.

        Raises:
            JobFailed: a rank failed.
            KeyboardInterrupt: a signal has ended them.
        """
        said = io.StringIO()
        with contextlib.redirect_stderr(said):
            code = run_local(world_size, entry, preload=preload, warm=True)
        if not quietly or code == EXIT_STOPPED:
            sys.stderr.write(said.getvalue())
        if code == EXIT_STOPPED:
            raise KeyboardInterrupt
        if code != 0:
            raise JobFailed(said.getvalue().strip())

    def _place(self, name: str) -> Path:
        return self.directory / f"{next(self._numbers)}-{name}"
