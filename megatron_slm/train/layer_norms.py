"""A hook that measures every layer: norms of gradient, update and weights, and the size of what the layer puts out."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from megatron_slm.parallel.gradients import unwrap
from megatron_slm.train.hook import Hook, StepResult
from megatron_slm.train.optimizer_state import LAYER_PREFIX, Master, counts_once, named_masters
from megatron_slm.train.step import TrainState

GRADIENT, UPDATE, WEIGHT, ELEMENTS, ACTIVATION, ACTIVATION_ELEMENTS = range(6)
COLUMNS = 6
PREDICTION_PREFIX = "mtp.layers."


class LayerNorms(Hook):
    """Measures every ``interval`` steps and hands the record to ``write``; between them it costs nothing.

    A measured step costs one exchange over the world and, while it lasts, a copy of this rank's master weights. The
    hook comes after any other that runs a forward pass in ``before_forward``: every forward pass of the step counts.
    """

    def __init__(
        self,
        interval: int,
        num_layers: int,
        groups: Any,
        write: Callable[[dict[str, Any]], None] | None,
        *,
        predictions: int = 0,
    ) -> None:
        """Measure nothing yet.

        Args:
            num_layers: of the whole model.
            write: takes the record of :func:`layer_record`, on the rank that logs.
            predictions: layers of multi-token prediction.
        """
        self._interval, self._groups, self._write = interval, groups, write
        self._parts = model_parts(num_layers, predictions)
        self._activations = Activations(self._parts)
        self._counted: list[Master] = []
        self._before: list[Tensor] = []
        self._sums: Tensor | None = None

    def before_forward(self, state: TrainState, inputs: Any) -> None:
        """Listen to the layers' outputs."""
        self._forget()
        if (state.step + 1) % self._interval == 0:
            self._activations.listen(state.chunks)

    def before_update(self, state: TrainState, inputs: Any) -> None:
        """Take what the gradients and weights are before the update."""
        if (state.step + 1) % self._interval:
            return
        masters = named_masters(state.optimizer, state.chunks)
        self._counted = [master for master in masters if counts_once(master, state.optimizer, self._groups)]
        self._before = [master.tensor.detach().clone() for master in self._counted]
        self._sums = torch.zeros(len(self._parts), COLUMNS, dtype=torch.float64, device=device_of(state))
        for master, before in zip(self._counted, self._before, strict=True):
            row = self._sums[self._parts.index(part_of(master.name))]
            row[WEIGHT] += sum_of_squares(before)
            row[ELEMENTS] += before.numel()
            if master.tensor.grad is not None:
                row[GRADIENT] += sum_of_squares(master.tensor.grad)
        self._activations.add_to(self._sums)

    def after_step(self, state: TrainState, result: StepResult) -> None:
        """Take the update, add up over the world and report. A step that was rejected is not measured."""
        if self._sums is not None and not result.skipped:
            for master, before in zip(self._counted, self._before, strict=True):
                row = self._sums[self._parts.index(part_of(master.name))]
                row[UPDATE] += sum_of_squares(master.tensor.detach() - before)
            dist.all_reduce(self._sums)
            if self._write is not None:
                where = {"step": result.step, "consumed_samples": result.consumed_samples}
                self._write(where | layer_record(self._parts, self._sums.tolist()))
        self._forget()

    def _forget(self) -> None:
        self._activations.stop()
        self._counted, self._before, self._sums = [], [], None


class Activations:
    """Sums of squares of what the parts of this rank's model put out, and their elements, while it is listening.

    Where tp ranks hold the same activations (without sequence parallelism), and where a layer is recomputed, both are
    counted several times, and the mean stays the same.
    """

    def __init__(self, parts: Sequence[str]) -> None:
        """Hear nothing yet; ``parts`` are those of the whole model."""
        self._parts = parts
        self._handles: list[RemovableHandle] = []
        self._sums: dict[str, tuple[Tensor | float, int]] = {}

    def listen(self, chunks: Sequence[nn.Module]) -> None:
        """Add up the outputs of every forward pass from now on."""
        for part, module in output_modules(chunks):

            def add(module: nn.Module, inputs: Any, output: Any, part: str = part) -> None:
                tensor = (output[0] if isinstance(output, tuple) else output).detach()
                squares, elements = self._sums.get(part, (0.0, 0))
                self._sums[part] = squares + sum_of_squares(tensor), elements + tensor.numel()

            self._handles.append(module.register_forward_hook(add))

    def add_to(self, sums: Tensor) -> None:
        """Add what was heard to [parts, COLUMNS], and stop listening."""
        for part, (squares, elements) in self._sums.items():
            row = sums[self._parts.index(part)]
            row[ACTIVATION] += squares
            row[ACTIVATION_ELEMENTS] += elements
        self.stop()

    def stop(self) -> None:
        """Listen no more and forget what was heard."""
        for handle in self._handles:
            handle.remove()
        self._handles, self._sums = [], {}


def model_parts(num_layers: int, predictions: int = 0) -> list[str]:
    """What is measured as one: embedding, each layer counted from 0 over the whole model, final norm, output layer or
    scalar head.

    A layer of multi-token prediction, with what surrounds it, is one too: ``mtp_1`` and so on.
    """
    layers = [f"layer_{number}" for number in range(num_layers)]
    deeper = [f"mtp_{depth}" for depth in range(1, predictions + 1)]
    return ["embedding", *layers, "final_norm", *deeper, "output_layer", "value_head"]


def part_of(name: str) -> str:
    """The part of the model that a parameter's global name belongs to."""
    if name.startswith(LAYER_PREFIX):
        return f"layer_{name.removeprefix(LAYER_PREFIX).partition('.')[0]}"
    if name.startswith(PREDICTION_PREFIX):
        return f"mtp_{int(name.removeprefix(PREDICTION_PREFIX).partition('.')[0]) + 1}"
    return "final_norm" if name.startswith("decoder.final_layernorm.") else name.partition(".")[0]


def output_modules(chunks: Sequence[nn.Module]) -> list[tuple[str, nn.Module]]:
    """The modules of this rank whose outputs are activations [S(/tp), B, H].

    The output layer is none of them: it ends in the loss, and its logits never exist as a whole.
    """
    found: list[tuple[str, nn.Module]] = []
    for chunk in map(unwrap, chunks):
        if chunk.pre_process or chunk.mtp_process:
            found.append(("embedding", chunk.embedding))
        found += [(f"layer_{layer.layer_number - 1}", layer) for layer in chunk.decoder.layers]
        if chunk.decoder.final_layernorm is not None:
            found.append(("final_norm", chunk.decoder.final_layernorm))
        if chunk.mtp_process:
            found += [(f"mtp_{depth}", layer.final_layernorm) for depth, layer in enumerate(chunk.mtp.layers, start=1)]
    return found


def sum_of_squares(tensor: Tensor) -> Tensor:
    """Scalar in float64: the result must not depend on how the elements are divided over ranks."""
    return torch.linalg.vector_norm(tensor, dtype=torch.float64).square()


def layer_record(parts: Sequence[str], sums: list[list[float]]) -> dict[str, dict[str, float]]:
    """Values by quantity and part; a part without parameters or activations has no entry.

    ``grad_norm``, ``update_norm`` and ``weight_norm`` are L2 norms of the gradient before clipping, of the weights'
    change and of the weights before it; ``update_ratio`` is the second over the third; ``activation_rms`` is the root
    of the mean square of the part's output over all tokens of the step.

    Args:
        sums: [parts][COLUMNS], over the world.
    """
    record: dict[str, dict[str, float]] = {}
    for part, row in zip(parts, sums, strict=True):
        values = {}
        if row[ELEMENTS]:
            gradient, update, weight = (math.sqrt(row[column]) for column in (GRADIENT, UPDATE, WEIGHT))
            values = {"grad_norm": gradient, "update_norm": update, "weight_norm": weight}
            values["update_ratio"] = update / weight if weight else math.nan
        if row[ACTIVATION_ELEMENTS]:
            values["activation_rms"] = math.sqrt(row[ACTIVATION] / row[ACTIVATION_ELEMENTS])
        for quantity, value in values.items():
            record.setdefault(quantity, {})[part] = value
    return record


def device_of(state: TrainState) -> torch.device:
    """Where this rank's parameters live."""
    return next(state.chunks[0].parameters()).device
