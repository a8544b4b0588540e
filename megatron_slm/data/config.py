"""Where the tokens come from and in which order they are read."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_slm.config.option import option


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """One prepared corpus: the directory that ``mslm data prepare`` wrote."""

    data_path: str | None = option(None, "prepared corpus: a directory holding train/, valid/ and tokenizer/")
    reset_attention_mask: bool = option(False, "tokens attend to their own document only")
    reset_position_ids: bool = option(False, "positions restart at 0 with every document")
    eod_mask_loss: bool = option(
        False, "no loss on what follows an end-of-document token, the start of an unrelated document"
    )
    data_seed: int | None = option(None, "seed of the sample order; default train.seed", minimum=0)


@dataclass(frozen=True, kw_only=True)
class TokenizerConfig:
    """The vocabulary. Its hash is frozen into the corpus and the checkpoint and compared on every load."""

    tokenizer_model: str | None = option(None, "sentencepiece model file; default the one inside data.data_path")
