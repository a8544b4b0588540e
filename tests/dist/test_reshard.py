"""A checkpoint saved under any layout loads under any other: weights, masters, moments and averages to the last bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megatron_slm.train import recovery
from megatron_slm.train.global_hash import differing, tensor_hashes
from megatron_slm.train.payload import read_common
from megatron_slm.train.payload_index import read_index
from megatron_slm.train.reshard import reshard
from tests import runs
from tests.breadth import BREADTH
from tests.ranks import run_ranks

N, K = 4, 2
EMA = "train.ema_decay=0.5"
BATCH = "train.global_batch_size=12"
EXPERTS = (
    "model.num_moe_experts=4",
    "model.moe_router_topk=2",
    "model.moe_ffn_hidden_size=16",
    "model.moe_router_score_function=sigmoid",
    "model.moe_router_enable_expert_bias=true",
    "model.moe_router_load_balancing_type=aux_loss",
    "model.moe_aux_loss_coeff=0.01",
    "model.moe_shared_expert_intermediate_size=16",
)


def degrees(**sizes: object) -> tuple[str, ...]:
    """Overrides of every degree: those not named are 1."""
    names = {
        "tp": "tensor_model_parallel_size",
        "pp": "pipeline_model_parallel_size",
        "vpp": "virtual_pipeline_model_parallel_size",
        "cp": "context_parallel_size",
        "ep": "expert_model_parallel_size",
        "etp": "expert_tensor_parallel_size",
        "distributed": "use_distributed_optimizer",
        "bucket": "ddp_bucket_size",
    }
    defaults: dict[str, object] = {
        "tp": 1,
        "pp": 1,
        "vpp": "null",
        "cp": 1,
        "ep": 1,
        "etp": "null",
        "distributed": True,
    }
    values = {**defaults, **sizes}
    sequence = f"parallel.sequence_parallel={values['tp'] != 1}".lower()
    return (sequence, *(f"parallel.{names[key]}={str(value).lower()}" for key, value in values.items()))


CHAINS: dict[str, tuple[tuple[str, ...], list[tuple[int, tuple[str, ...]]]]] = {
    "dense": (
        ("precision.bf16=true", EMA, BATCH),
        [
            (4, degrees(tp=2, pp=2)),
            (1, degrees(distributed=False)),
            (2, degrees(pp=2, vpp=2)),
            (3, degrees(bucket=5000)),  # three replicas pad their buckets
            (4, degrees(tp=2, cp=2, distributed=False)),
        ],
    ),
    "experts": (
        (*EXPERTS, EMA, BATCH),
        [
            (4, degrees(tp=2, ep=2, etp=1)),
            (1, degrees()),
            (4, degrees(ep=4, bucket=3000)),
            (4, degrees(pp=2, ep=2, distributed=False)),
            (4, degrees(tp=2, ep=2, etp=2)),
        ],
    ),
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.corpus(tmp_path_factory.mktemp("corpus"))


def load_and_save(overrides: list[str], by_core: bool = False) -> None:
    """One rank: load a run's newest checkpoint, and publish what was loaded in its place.

    Args:
        by_core: with the optimizer's state as core 0.16.1 stores it, which this program did before.
    """
    from megatron_slm import run
    from megatron_slm.config.load import load
    from megatron_slm.train import checkpoint
    from megatron_slm.train.run_directory import stored_identity
    from megatron_slm.train.saved_state import SavedState, layout_record

    resolved = load(None, overrides)
    with run.assembled(resolved, runs.rank_environment(), fresh=False) as parts:
        saved = SavedState(
            step=parts.state.step,
            consumed_samples=parts.state.cursor.consumed_samples,
            cursor=parts.state.cursor.to_dict(),
            layout=layout_record(parts.layout),
            params_dtype=resolved.config.precision.params_dtype,
            tokenizer_hash=parts.data.tokenizer.hash,
            parts=sorted(parts.state.parts),
        )

        def add_files(temporary: Path) -> None:
            (temporary / "config.yaml").write_text(resolved.to_yaml())

        destination = checkpoint.Destination(
            parts.directory.checkpoints, identity=stored_identity(parts.directory.path) or "", add_files=add_files
        )
        with pytest.MonkeyPatch.context() as patch:
            if by_core:
                patch.setattr(checkpoint, "optimizer_shards", core_shards)
            checkpoint.write(checkpoint.stage(saved, parts.state, copy=False), destination)


def core_shards(optimizer: Any, chunks: list[Any], models: dict[str, Any]) -> Any:
    """What core stores of an optimizer."""
    metadata = {"distrib_optim_sharding_type": "fully_reshardable", "chained_optim_avoid_prefix": True}
    return optimizer.sharded_state_dict(models, is_loading=False, metadata=metadata)


def cuts(checkpoint: Path) -> dict[str, Any]:
    """Of every tensor its pieces, of every object that is no rank's own: the files they are in."""
    index = read_index(checkpoint)
    found: dict[str, Any] = {
        name: sorted((chunk.offsets, chunk.sizes, chunk.span.file) for chunk in tensor.chunks)
        for name, tensor in index.tensors.items()
    }
    return found | {name: span.file for name, span in index.objects.items() if not name.startswith("random")}


@pytest.mark.parametrize("chain", CHAINS)
def test_every_layout_saves_what_it_has_loaded(tmp_path: Path, data: Path, chain: str) -> None:
    """Around a chain of layouts back to the first; beside each, the offline reshard lies as the ranks have saved."""
    common, layouts = CHAINS[chain]
    run = tmp_path / "run"
    iters = (*common, f"train.train_iters={N}", f"train.exit_interval={K}")
    (world_size, first), *others = layouts
    assert runs.train(run, data, world_size, *iters, *first) == 75
    checkpoint = runs.checkpoint_path(run, K)
    expected = tensor_hashes(checkpoint)
    assert any(name.startswith("optimizer.state.param.") for name in expected)
    assert any(name.startswith("ema.") for name in expected)
    for number, (world_size, layout) in enumerate([*others, layouts[0]]):
        offline = reshard(run, tmp_path / f"offline{number}", [*layout, f"parallel.world_size={world_size}"])
        run_ranks(load_and_save, world_size, runs.given(run, data, *iters, *layout))
        assert differing(expected, tensor_hashes(checkpoint)) == [], layout
        assert differing(expected, tensor_hashes(offline.path)) == []
        assert cuts(offline.path) == cuts(checkpoint), layout
        assert read_common(checkpoint)["optimizer"]["step"] == K
        assert recovery.find(run).state.layout == dict(offline.after)


@pytest.mark.parametrize(
    ("bf16", "distributed"), [pytest.param(False, False, marks=BREADTH), (True, False), (True, True)]
)
def test_a_checkpoint_with_what_core_stores_is_still_read(
    tmp_path: Path, data: Path, bf16: bool, distributed: bool
) -> None:
    run = tmp_path / "run"
    own = (f"precision.bf16={bf16}".lower(), "train.train_iters=2", *degrees(distributed=distributed))
    assert runs.train(run, data, 1, *own) == 0
    checkpoint = runs.checkpoint_path(run, 2)
    expected = tensor_hashes(checkpoint)
    for by_core in (True, False):
        run_ranks(load_and_save, 1, runs.given(run, data, *own), by_core)
        assert ("optimizer.state.param.output_layer.weight" in tensor_hashes(checkpoint)) is (
            distributed or not by_core
        )
    assert differing(expected, tensor_hashes(checkpoint)) == []
    assert read_common(checkpoint)["optimizer"]["step"] == 2


def test_training_goes_on_as_if_nothing_had_been(tmp_path: Path, data: Path) -> None:
    """Online and from the offline reshard to the same bits; both within fp32 reassociation of the straight run."""
    # Layers that are not alike have names of their own.
    iters = (*EXPERTS, "model.moe_first_dense_layers=1", f"train.train_iters={N}")
    before, after = degrees(tp=2, ep=2), degrees(pp=2)
    straight, online, offline = (tmp_path / name for name in ("straight", "online", "offline"))
    assert runs.train(straight, data, 4, *iters, *before) == 0
    assert runs.train(online, data, 4, *iters, f"train.exit_interval={K}", *before) == 75
    done = reshard(online, offline, [*after, "parallel.world_size=2"])
    assert done.path == runs.checkpoint_path(offline, K)
    for run in (online, offline):
        assert runs.train(run, data, 2, *iters, *after) == 0
    losses = {run.name: [record["lm_loss"] for record in runs.records(run)] for run in (straight, online)}
    assert losses["online"] == pytest.approx(losses["straight"], rel=1e-5)
    assert {step: bits for step, bits in runs.losses(online).items() if step > K} == runs.losses(offline)
    ends = [tensor_hashes(runs.checkpoint_path(run, N)) for run in (online, offline)]
    assert differing(*ends) == []
