"""Through DALI the micro-batches are those of the torch loader, bit by bit, wherever a run begins and goes on."""

from __future__ import annotations

import importlib.util
from fractions import Fraction
from pathlib import Path

import pytest
import torch

from megatron_slm.config import rules_packages
from megatron_slm.config.load import load
from megatron_slm.config.rules import violations
from megatron_slm.data.batch import Batch
from megatron_slm.data.config import DataConfig
from megatron_slm.data.corpus import Corpus
from megatron_slm.data.cursor import Cursor
from megatron_slm.data.loader import TrainLoader
from megatron_slm.data.loader_dali import DaliLoader
from tests.unit.test_loader import SEQ_LENGTH, cursor_at, mixture_of, order_of, written

HERE = rules_packages.installed("nvidia.dali")
needs_dali = pytest.mark.skipif(not HERE, reason=f"NVIDIA DALI is not installed: pip install {rules_packages.DALI}")

DOCUMENTS = DataConfig(reset_attention_mask=True, reset_position_ids=True, eod_mask_loss=True)
WINDOWS = DataConfig(
    reset_attention_mask=True, reset_position_ids=True, length_schedule=("0: 2", "5: 4", f"33: {SEQ_LENGTH}")
)


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Corpus]:
    return {name: written(tmp_path_factory.mktemp(name), seed) for seed, name in enumerate(("one", "two"))}


class Pair:
    """Both loaders of one rank."""

    def __init__(self, corpora: dict[str, Corpus], config: DataConfig, micro: int, rank: int, size: int) -> None:
        where = {
            "config": config,
            "seq_length": SEQ_LENGTH,
            "micro_batch_size": micro,
            "data_parallel_rank": rank,
            "data_parallel_size": size,
        }
        self.plain = TrainLoader(corpora, **where)
        self.dali = DaliLoader(corpora, device_id=None, **where)

    def compare(self, cursor: Cursor, samples: int) -> list[Batch]:
        """All micro-batches of a step, held at once: none may lie where the next one is written."""
        expected = list(self.plain.micro_batches(cursor, samples))
        found = list(self.dali.micro_batches(cursor, samples))
        assert len(found) == len(expected)
        for batch, wanted in zip(found, expected, strict=True):
            assert list(batch) == list(wanted)
            for name, tensor in wanted.items():
                assert batch[name].dtype == tensor.dtype and batch[name].device == tensor.device, name
                assert torch.equal(batch[name], tensor), name
        return found


@needs_dali
@pytest.mark.parametrize("config", [DataConfig(), DOCUMENTS, WINDOWS], ids=["plain", "documents", "windows"])
@pytest.mark.parametrize(("micro", "rank", "size"), [(1, 0, 1), (12, 0, 1), (3, 1, 2), (2, 2, 3), (1, 3, 4)])
def test_a_mixture_is_the_same_on_every_rank(
    corpora: dict[str, Corpus], config: DataConfig, micro: int, rank: int, size: int
) -> None:
    """Two steps, the second of another size, from a position in the middle; phases and windows change inside."""
    pair = Pair(corpora, config, micro, rank, size)
    cursor = cursor_at(mixture_of(corpora), 1)
    pair.compare(cursor, 12)
    pair.compare(cursor.advance(12), 24)


@needs_dali
@pytest.mark.parametrize("consumed", [0, 7, 31])
def test_a_resume_at_any_position_goes_on_as_the_run_would(corpora: dict[str, Corpus], consumed: int) -> None:
    order = order_of(corpora["one"])
    running = Pair({"one": corpora["one"]}, DataConfig(), 2, 0, 1)
    running.compare(cursor_at(order, consumed), 4)
    later = Cursor.start(order, "t").skip(consumed).advance(4)
    resumed = Pair({"one": corpora["one"]}, DataConfig(), 4, 0, 1)  # the micro-batch size may change at a resume
    whole = torch.cat([batch["tokens"] for batch in resumed.compare(Cursor.from_dict(later.to_dict()), 8)])
    assert torch.equal(whole, torch.cat([batch["tokens"] for batch in running.compare(later, 8)]))


@needs_dali
def test_a_roll_back_a_skip_new_shares_and_a_peek_are_followed(corpora: dict[str, Corpus]) -> None:
    """What was read ahead for another position or order is never given."""
    pair = Pair(corpora, DataConfig(), 2, 0, 1)
    start = cursor_at(mixture_of(corpora), 0)
    next(pair.dali.micro_batches(start, 8))  # a run looks at its first micro-batch, and begins the step anew
    pair.compare(start, 8)
    pair.compare(start.advance(8).skip(6), 8)
    pair.compare(start.advance(8), 8)
    adaptive = start.advance(16).with_phase({"one": Fraction(1), "two": Fraction(9)})
    assert adaptive.order != start.order
    pair.compare(adaptive, 8)


@needs_dali
def test_it_draws_no_random_numbers_and_says_where_it_reads(corpora: dict[str, Corpus]) -> None:
    """Random states are a run's own; positions are what an investigation asks a loader for."""
    pair = Pair(corpora, DataConfig(), 2, 1, 2)
    before = torch.get_rng_state()
    pair.compare(cursor_at(mixture_of(corpora), 0), 8)
    assert torch.equal(torch.get_rng_state(), before)
    assert pair.dali.positions(1, 8) == pair.plain.positions(1, 8) == range(14, 16)


def refused(*overrides: str) -> list[str]:
    resolved = load(None, ["data.data_path=a", *overrides])
    return violations(resolved.config, provenance=resolved.provenance)


def test_without_dali_a_check_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    (said,) = refused("data.loader=dali")
    assert "data.loader = dali (command line) needs NVIDIA DALI" in said
    assert "pip install nvidia-dali-cuda130==2.4.0" in said and "data.loader=torch" in said


def test_pypis_stub_is_no_dali_and_has_to_go(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What `pip install nvidia-dali` leaves: a distribution of that name, and no module."""
    facts = tmp_path / "nvidia_dali-0.0.1.dev5.dist-info"
    facts.mkdir()
    (facts / "METADATA").write_text("Metadata-Version: 2.1\nName: nvidia-dali\nVersion: 0.0.1.dev5\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    (said,) = refused("data.loader=dali")
    assert "pip uninstall nvidia-dali; pip install nvidia-dali-cuda130==2.4.0" in said


def test_other_stages_are_read_by_torch() -> None:
    said = " ".join(refused("data.loader=dali", "stage=sft"))
    assert "the rows of the other stages are read by torch. Set data.loader=torch." in said


@needs_dali
def test_installed_it_is_accepted() -> None:
    assert refused("data.loader=dali") == []
