"""What a run starts from: its own newest checkpoint, another run's weights, or the seed."""

from __future__ import annotations

from pathlib import Path

from megatron_slm.config.load import load
from megatron_slm.config.run_config import RunConfig
from megatron_slm.data.cursor import Cursor, check_resume
from megatron_slm.errors import CheckpointError
from megatron_slm.model.config import ModelConfig
from megatron_slm.train import checkpoint, publish
from megatron_slm.train.step import TrainState


def verify_origin(config: RunConfig, checkpoints: Path, start: Cursor, *, fresh: bool) -> None:
    """Read the checkpoint that ``restore`` will load, before anything of the run is written. One rank alone.

    Args:
        checkpoints: of the run.
        start: a cursor of the present data; its position does not matter.
        fresh: the run's own checkpoints are about to be moved aside.

    Raises:
        CheckpointError: missing, damaged, of another model, or its next samples would not be the ones it promised.
    """
    latest = None if fresh else publish.latest(checkpoints)
    if latest is not None:
        publish.verify(latest)
        check_resume(Cursor.from_dict(checkpoint.read_state(latest).cursor), start)
    elif config.checkpoint.pretrained_checkpoint is not None:
        source = checkpoint.find(Path(config.checkpoint.pretrained_checkpoint))
        publish.verify(source)
        checkpoint.read_state(source)
        require_same_shape(source, config.model)


def restore(state: TrainState, config: RunConfig, checkpoints: Path, *, layout: dict[str, int]) -> str:
    """Load what ``verify_origin`` has accepted into a new state. Collective.

    Args:
        layout: degrees under which random states have their owners.

    Returns:
        What the state came from, in words.

    Raises:
        CheckpointError: of another model.
    """
    latest = publish.latest(checkpoints)
    if latest is not None:
        saved = checkpoint.load(latest, state.chunks, state.optimizer, state.random, layout=layout)
        state.step, state.cursor = saved.step, Cursor.from_dict(saved.cursor)
        done = saved.step >= config.train.train_iters
        return f"resumed {latest} at step {saved.step}" + (
            f"; train.train_iters = {config.train.train_iters} is reached already" if done else ""
        )
    if config.checkpoint.pretrained_checkpoint is not None:
        source = checkpoint.find(Path(config.checkpoint.pretrained_checkpoint))
        checkpoint.load_weights(source, state.chunks, state.optimizer)
        return f"weights from {source}; new optimizer, step 0"
    return f"new run from seed {config.train.seed}"


def require_same_shape(source: Path, model: ModelConfig) -> None:
    """Compare the fields that decide the parameters' shapes and meaning.

    Raises:
        CheckpointError: names every field that differs, with both values.
    """
    theirs, ours = (shape(config) for config in (load(source / "config.yaml").config.model, model))
    changed = [f"model.{key}: {theirs[key]} there, {ours[key]} here" for key in ours if theirs[key] != ours[key]]
    if changed:
        raise CheckpointError(
            f"{source} holds another model ({'; '.join(changed)}); set these fields to the checkpoint's values, or "
            "name another checkpoint.pretrained_checkpoint"
        )


def shape(model: ModelConfig) -> dict[str, object]:
    """Every field that a weight's shape or use depends on, derived values filled in."""
    return {
        "num_layers": model.num_layers,
        "hidden_size": model.hidden_size,
        "ffn_hidden_size": model.ffn_size,
        "num_attention_heads": model.num_attention_heads,
        "num_query_groups": model.query_groups,
        "kv_channels": model.head_dim,
        "position_embedding_type": model.position_embedding_type,
        "normalization": model.normalization,
        "swiglu": model.swiglu,
        "openai_gelu": model.openai_gelu,
        "add_bias_linear": model.add_bias_linear,
        "add_qkv_bias": model.add_qkv_bias,
        "untie_embeddings_and_output_weights": model.untie_embeddings_and_output_weights,
    }
