"""What went wrong, in words for the person who typed the command. Each class fixes an exit code (DESIGN: commands)."""

from __future__ import annotations

EXIT_HUNG = 70
"""Of a rank that its watchdog ends; whoever started the ranks ends with 1."""


class UserError(Exception):
    """The input was refused and nothing was done. The message names the rule, the value and the way out."""

    exit_code = 2


class ConfigError(UserError):
    """One or several rules of the configuration are violated; the message lists them all."""


class DataError(UserError):
    """A corpus, shard or tokenizer is missing, damaged or not the one that was promised."""


class CheckpointError(UserError):
    """A checkpoint is missing, damaged or belongs to another run."""


class ConversionError(UserError):
    """What was converted is not what it was made from; nothing of it is published."""

    exit_code = 1


class LogError(UserError):
    """The run's directory cannot be written any more; what was saved stays."""

    exit_code = 1


class SaveError(UserError):
    """A checkpoint could not be written; those before it stay."""

    exit_code = 1


class NonFiniteError(UserError):
    """Training has produced NaN or infinity; the run ends before anything of it is applied."""

    exit_code = 1


class SpikeError(UserError):
    """Loss or gradient norm has jumped and the run is to stop; nothing of that step was applied."""

    exit_code = 1


class RolloutError(UserError):
    """What a model has generated cannot be learned from; nothing of that step was applied."""

    exit_code = 1


class ReplayError(UserError):
    """A run that was to be made again has failed or ended early, so that there is nothing to compare."""

    exit_code = 1


class FaultError(UserError):
    """The machine has computed one thing in two ways; nothing of that step was applied."""

    exit_code = 17  # Megatron's code for a result that was not validated


class LaunchError(UserError):
    """The ranks cannot be started as asked."""


class NetworkError(UserError):
    """An exchange between ranks has ended because one of them, or the way to it, is lost."""

    exit_code = 1
