"""Where the tokens come from and in which order they are read."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_slm.config.option import option


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """One prepared corpus (``data_path``) or a mixture of several (``sources``), and the order they are read in.

    Samples are counted from the start of the run. Lists of NAME=VALUE may be written as a mapping in YAML.
    """

    data_path: str | None = option(None, "prepared corpus: a directory holding train/, valid/ and tokenizer/")
    sources: tuple[str, ...] = option((), "a mixture instead of data_path: NAME=DIR, prepared corpora of one tokenizer")
    weights: tuple[str, ...] = option((), "share of each source, NAME=NUMBER on any scale; default by temperature")
    temperature: float = option(
        1.0, "shares without weights are tokens^(1/temperature): 1 by size, more towards equal", minimum=1.0
    )
    phases: tuple[str, ...] = option((), "later shares, each 'SAMPLE: NAME=NUMBER ...', from that sample of the run on")
    loss_aware_strength: float = option(
        0.0,
        "after a validation, shares change by exp(strength x (held-out loss - mean)); 0 off",
        minimum=0.0,
    )
    replay_run: str | None = option(None, "run whose already trained samples come again, as a source named replay")
    replay_share: float = option(0.05, "share of the replayed samples", above=0.0, below=1.0)
    length_schedule: tuple[str, ...] = option(
        (), "short before long: each 'SAMPLE: TOKENS', from that sample on tokens attend inside windows of so many"
    )
    reset_attention_mask: bool = option(False, "tokens attend to their own document only")
    reset_position_ids: bool = option(False, "positions restart at 0 with every document")
    eod_mask_loss: bool = option(
        False, "no loss on what follows an end-of-document token, the start of an unrelated document"
    )
    pack_rows: bool = option(True, "after pretraining: several examples share a row, each attending to itself alone")
    train_on: str = option(
        "assistant",
        "after pretraining, the labels that count: what the assistant says, the last turn alone (completion), or all",
        choices=("assistant", "completion", "all"),
    )
    curriculum: str | None = option(
        None,
        "after pretraining, easy before hard: every example once by length, or by the score of `mslm data examples "
        "--score-key`, then all at random",
        choices=("length", "score"),
    )
    curriculum_parts: int = option(4, "parts of a curriculum; inside of each the order is random", minimum=2)
    data_seed: int | None = option(None, "seed of the sample order; default train.seed", minimum=0)
    loader: str = option(
        "torch",
        "what makes micro-batches of the samples, in pretraining: torch, or a pipeline of NVIDIA DALI, which reads "
        "ahead; both give the same",
        choices=("torch", "dali"),
    )


@dataclass(frozen=True, kw_only=True)
class TokenizerConfig:
    """The vocabulary. Its hash is frozen into the corpus and the checkpoint and compared on every load."""

    tokenizer_model: str | None = option(
        None, "sentencepiece model or tokenizer.json; default the one inside data.data_path"
    )
