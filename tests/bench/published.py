"""Published runs, one a row of a CSV, as our configurations: what is stated, what is inferred, and what has no word.

The columns are those of ``published_points.csv`` beside this file (README of the collection: one row a run, an empty
cell is not stated). ``case_of`` gives a :class:`Case`, or a :class:`NotCovered` with the reason.
"""

from __future__ import annotations

import csv
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_slm.config.load import load
from megatron_slm.config.run_config import RunConfig
from megatron_slm.config.values import show
from megatron_slm.errors import ConfigError, DataError

POINTS = Path(__file__).with_name("published_points.csv")
COLUMNS = ("row", "source_id", "model", "layers", "hidden", "gpus", "tp", "pp", "micro_batch", "global_batch", "status")

GPUS: Mapping[str, str] = {"A100": "a100-80gb", "H100": "h100-80gb", "B200": "b200", "GB200": "gb200", "GB300": "gb300"}
"""How a row names a GPU, up to a hyphen -> cluster of the planner."""

RULES: Mapping[str, str] = {
    "gpus-ci": "GPUs of a functional test: 8. Every recipe of core_v0.16.1's tests/test_utils/recipes says 1 x 8 "
    "(A100, H100) or 2 x 4 (GB200).",
    "gpus-release": "GPUs of a release run, which no public file states: of the smallest world times a power of two, "
    "the one whose closed-form static memory is nearest to the measured one. Circular for static memory, so these rows "
    "are left out of its share; they count for the peak.",
    "release-before-te-2.3": "Release runs were recorded before Transformer Engine 2.3 began to keep dummy gradients: "
    "with them no number of GPUs explains their static memory.",
    "vocabulary-tokenizer": "Vocabulary of a release run from its tokenizer-type, whose file its model_config.yaml "
    "names: 256,000 (nemotron_2_256k) of GPTSentencePieceTokenizer, 32,000 of Llama2Tokenizer.",
    "vocabulary-padded": "Megatron pads the vocabulary to a multiple of make_vocab_size_divisible_by x tp.",
    "split-counts-both": "The layers divide over the pipeline's chunks only with embedding and loss counted as one "
    "layer each (account_for_embedding_in_pipeline_split, account_for_loss_in_pipeline_split).",
    "last-stage-alone": "Uneven stages: the judged last stage is that of an even pipeline whose every stage has as "
    "many layers.",
    "instances": "num_distributed_optimizer_instances n shards over dp / n ranks: memory of a world n times smaller.",
    "vocabulary-128k": "AlephLayouts prints no vocabulary: 128,000, which its MFU and step time need.",
    "batch-from-mfu": "AlephLayouts prints no global batch: constant, which its MFU and step time need.",
    "gradients-16": "ZeRO-1 of AlephLayouts' framework keeps 16-bit gradients (Aleph-Alpha/scaling, "
    "core/optimizer/parameter_group.py).",
    "vocabulary-gpt2": "Tables of GPT models that print no vocabulary: 51,200, GPT-2's padded, as in SC'21.",
    "heads-equal": "Key/value heads that are not stated are as many as the query heads.",
    "width-4h": "An MLP's width that is not stated is 4 x hidden_size.",
    "precision-16": "A format that is not stated is a 16-bit one.",
    "recompute-none": "Recomputation that is not stated is none.",
    "deepseek-shape": "Latent attention and experts of a DeepSeek model by its name, cut to the printed layers, the "
    "first of them dense (SimuMax run_pretrain_deepseekv2.sh); capacity factor 1, grouped experts.",
    "ends-lighter": "First and last stage hold one layer fewer: embedding and loss count as one layer each.",
    "fullest-stage": "Layers that do not divide over the pipeline are rounded up: the fullest stage, which decides "
    "memory and pace, holds as many.",
    "style-llama": "RMSNorm, SwiGLU, rotary positions, no biases, no dropout, two tables, by the model's name.",
    "style-gpt": "LayerNorm, GELU, learned positions, biases, dropout, one table, by the model's name.",
}
"""Name -> how what a row does not state is inferred."""

EQUAL: Mapping[str, str] = {
    "fp16": "fp16 as bf16 with 16-bit gradients: the same bytes but for a copy of the gradients in the optimizer",
    "squared-relu": "squared ReLU as GELU: both keep their input",
    "layernorm-1p": "a weight counted from one has as many elements",
    "top-1": "one expert a token, which those tests choose by sinkhorn (their model_config.yaml; the column leaves it "
    "out), as one chosen behind a softmax: a few numbers a token and expert either way",
    "zero-1": "ZeRO-1 as the distributed optimizer",
}
"""Name -> what stands in for an option we lack; equal in memory."""


@dataclass(frozen=True, kw_only=True)
class Target:
    """The measured program where our configuration has no word for it.

    Attributes:
        engine: modules of the layers, "te" (Transformer Engine), "core", or "plain" (torch's own).
        fused_norm: one kernel for a norm, where the engine leaves a choice.
        attention: "flash", "fused" (cuDNN), "unfused" (scores in memory), or "auto": which of the first two TE prefers.
        loss: "te", "core" or "core-fused" cross entropy.
        cached_gradients: TE keeps one dummy gradient a shape of fused weight gradients (since v2.3, April 2025).
        options: of core's configuration, name and value.
        fp8: recipe, or None.
        fp16: with loss scaling.
        deterministic: cuBLAS has the workspace that makes it so.
    """

    engine: str = "te"
    fused_norm: bool = True
    attention: str = "auto"
    loss: str = "te"
    cached_gradients: bool = True
    options: tuple[tuple[str, Any], ...] = ()
    fp8: str | None = None
    fp16: bool = False
    deterministic: bool = False


@dataclass(frozen=True)
class Row:
    """One row of the CSV."""

    cells: Mapping[str, str]

    def text(self, column: str) -> str:
        """A cell; empty where it is not stated."""
        return (self.cells.get(column) or "").strip()

    def number(self, column: str) -> float | None:
        """A cell as a number, None where it is not stated.

        Raises:
            DataError: it is no number.
        """
        text = self.text(column)
        try:
            return float(text) if text else None
        except ValueError as error:
            raise DataError(f"row {self.text('row')}: {column} = {text!r} is no number.") from error

    def whole(self, column: str, default: int | None = None) -> int | None:
        """A cell as a whole number."""
        value = self.number(column)
        return default if value is None else int(value)

    @property
    def source(self) -> str:
        """The table it is from."""
        return self.text("source_id")

    @property
    def flags(self) -> dict[str, str]:
        """Column ``flags``: Megatron's command line, ``a=b; c=true``."""
        pairs = (part.partition("=") for part in self.text("flags").split(";") if part.strip())
        return {name.strip(): value.strip() for name, _, value in pairs}


@dataclass(frozen=True, kw_only=True)
class Case:
    """A row as a configuration of ours.

    Attributes:
        values: dotted key -> value, what ``config.load`` is given.
        gpu: as the row names it.
        stage: pipeline stage whose memory was measured, counted from the end where negative; None where it is the
            largest of all ranks.
        target: the program that was measured.
        inferred: names of :data:`RULES`.
        equal: names of :data:`EQUAL`.
    """

    row: Row
    values: Mapping[str, Any]
    gpu: str
    stage: int | None
    target: Target = field(default_factory=Target)
    inferred: tuple[str, ...] = ()
    equal: tuple[str, ...] = ()

    @functools.cached_property
    def config(self) -> RunConfig:
        """The configuration, resolved; its device is the CPU, for the dry world has no other."""
        typed = {key: value if isinstance(value, str) else show(value) for key, value in self.values.items()}
        return load(None, [f"{key}={text}" for key, text in typed.items()]).config

    @property
    def judged_stage(self) -> int | None:
        """:attr:`stage`, counted from 0."""
        stages = self.config.parallel.pipeline_model_parallel_size
        return None if self.stage is None else self.stage % stages

    @property
    def key(self) -> tuple[Any, ...]:
        """Equal for rows whose memory is predicted alike: configuration, program, generation of the GPU, rank."""
        values = tuple(sorted((key, str(value)) for key, value in self.values.items()))
        return values, self.gpu.partition("-")[0], self.stage, self.target

    @property
    def name(self) -> str:
        """Source, row and model."""
        return f"{self.row.source} {self.row.text('row')} {self.row.text('model')}"

    @property
    def world_size(self) -> int:
        """GPUs."""
        return self.config.parallel.world_size or self.config.parallel.smallest_world_size

    def measured(self, column: str) -> float | None:
        """What was measured, None where it was not."""
        return self.row.number(column)


@dataclass(frozen=True)
class NotCovered:
    """A row that is no configuration of ours."""

    row: Row
    reason: str


Reader = Callable[[Row], "Case | NotCovered"]


def read_rows(path: Path) -> list[Row]:
    """The rows of a CSV.

    Raises:
        DataError: there is no such file, or it lacks a column.
    """
    try:
        with path.open(encoding="utf-8", newline="") as file:
            reader = csv.DictReader(file)
            rows = [Row(cells) for cells in reader]
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}. Give --runs a CSV of published runs.") from error
    if missing := [column for column in COLUMNS if column not in (reader.fieldnames or ())]:
        raise DataError(f"{path} has no column {', '.join(missing)}; it needs at least {', '.join(COLUMNS)}.")
    return rows


def cases_of(rows: Sequence[Row], readers: Mapping[str, Reader]) -> list[Case | NotCovered]:
    """Every row by the reader of its source (the longest name that the source begins with)."""
    return [case_of(row, readers) for row in rows]


def case_of(row: Row, readers: Mapping[str, Reader]) -> Case | NotCovered:
    """One row; what its configuration breaks is the reason why it is not covered."""
    names = [name for name in readers if row.source.startswith(name)]
    if not names:
        return NotCovered(row, "no reader for this source")
    try:
        found = readers[max(names, key=len)](row)
        if isinstance(found, Case):
            _ = found.config
    except ConfigError as error:
        return NotCovered(row, str(error).splitlines()[0])
    return found
