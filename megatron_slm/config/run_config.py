"""The whole configuration of a run: one section per room, each section's dataclass beside what it configures."""

from __future__ import annotations

from dataclasses import dataclass, field

from megatron_slm.config.option import option
from megatron_slm.data.config import DataConfig, TokenizerConfig
from megatron_slm.model.config import LoraConfig, ModelConfig
from megatron_slm.parallel.config import ParallelConfig
from megatron_slm.profile.config import ProfileConfig
from megatron_slm.replay.config import ReplayConfig
from megatron_slm.rollout.config import RolloutConfig
from megatron_slm.stages.config import DistillConfig, DpoConfig, GrpoConfig, PpoConfig, RewardConfig, SftConfig
from megatron_slm.train.config import (
    CheckpointConfig,
    LogConfig,
    OptimizerConfig,
    PrecisionConfig,
    ScheduleConfig,
    TrainConfig,
)

STAGES = ("pretrain", "sft", "reward", "dpo", "ppo", "grpo", "distill")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Everything that decides what a run computes. Built by :func:`megatron_slm.config.load.load`."""

    stage: str = option("pretrain", "what the run does to the model", choices=STAGES)
    preset: str | None = option(None, "published model shape to start from; every other value overrides it")
    name: str | None = option(None, "the run's directory below log.runs_dir; default the file's stem, then the preset")
    model: ModelConfig = field(default_factory=ModelConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    data: DataConfig = field(default_factory=DataConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: LogConfig = field(default_factory=LogConfig)
    replay: ReplayConfig = field(default_factory=ReplayConfig)
    profile: ProfileConfig = field(default_factory=ProfileConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    sft: SftConfig = field(default_factory=SftConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    dpo: DpoConfig = field(default_factory=DpoConfig)
    ppo: PpoConfig = field(default_factory=PpoConfig)
    grpo: GrpoConfig = field(default_factory=GrpoConfig)
    distill: DistillConfig = field(default_factory=DistillConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
