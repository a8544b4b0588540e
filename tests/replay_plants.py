"""Faults planted into a training run: each is called in every rank before it trains. A rank may be struck alone.

What is struck happens in step ``STEP``, the second of a run, so that the step before is equal.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

STEP = 2
STRUCK = "decoder.layers.1.mlp.linear_fc2.weight"
LAYER = "decoder.layers.1"
ROTATION = "MSLM_ROTATE_RANKS"


def flipped(tensor: torch.Tensor, bit: int, place: int = 5) -> torch.Tensor:
    """The tensor with one bit of one element the other way; ``bit`` counts from the lowest of the first two bytes."""
    struck = tensor.detach().clone()
    struck.view(-1).view(torch.int16)[place] ^= 1 << bit
    return struck


def gradient_bit(rank: int, bit: int) -> None:
    """One bit of one rank's own gradient, as one micro-batch gives it."""
    _strike_gradient(rank, lambda gradient: flipped(gradient, bit))


def gradient_dropped(rank: int) -> None:
    """One rank's own gradient of a weight is lost."""
    _strike_gradient(rank, torch.zeros_like)


def reduced_gradient_bit(rank: int) -> None:
    """One bit of what one rank holds of the reduced gradients."""

    def strike(state: Any) -> None:
        named = _parameters(state)
        named[STRUCK].main_grad.view(-1).view(torch.int16)[5] ^= 64

    _add_hook(after_backward=_on(rank, strike))


def activation_bit(rank: int) -> None:
    """One bit of a layer's output."""
    _strike_output(rank, lambda output: (flipped(output[0], 3).requires_grad_(), *output[1:]), LAYER)


def expert_choice(rank: int) -> None:
    """A router sends every token to the expert beside its own, as after a tie that fell otherwise."""

    def strike(output: Any) -> Any:
        return tuple(part.roll(1, -1) for part in output)

    _strike_output(rank, strike, f"{LAYER}.mlp.router")


def swapped_micro_batches(rank: int) -> None:
    """One rank reads its micro-batches of a step in the other order."""
    _change_batches(rank, lambda batches: list(reversed(batches)))


def one_token(rank: int) -> None:
    """One token that one rank reads is another."""

    def change(batches: list[Any]) -> list[Any]:
        batches[0]["tokens"][0, 3] ^= 1
        return batches

    _change_batches(rank, change)


def random_draw(rank: int) -> None:
    """One rank draws one random number before a step."""
    _add_hook(before_step=_on(rank, lambda state: torch.rand(1)))


def dropout_seed() -> None:
    """Random states begin from another seed than the configuration's."""
    from megatron_slm.train.random_state import RandomState

    reseed = RandomState.reseed

    def other(self: Any, step: int) -> None:
        seed, *place = self._identity
        self._identity = (seed + 1, *place)
        reseed(self, step)
        self._identity = (seed, *place)

    RandomState.reseed = other  # type: ignore[method-assign]


def stale_parameter(rank: int) -> None:
    """One rank keeps a weight as it was before the update."""

    def around(state: Any, update: Callable[[], None]) -> None:
        weight = _parameters(state)[STRUCK]
        before = weight.detach().clone()
        update()
        weight.data.copy_(before)

    _around_update(rank, around)


def moment_bit(rank: int) -> None:
    """One bit of one moment of one rank's optimizer."""

    def around(state: Any, update: Callable[[], None]) -> None:
        from megatron_slm.train.optimizer_state import inner_optimizers

        update()
        inner = next(iter(inner_optimizers(state.optimizer)))
        moment = next(iter(inner.optimizer.state.values()))["exp_avg"]
        moment.view(-1).view(torch.int32)[0] ^= 1 << 20

    _around_update(rank, around)


def learning_rate_one_step_late() -> None:
    """Every update is made with the rate of the next one."""
    from megatron_slm import run

    rate = run.learning_rate
    run.learning_rate = lambda step, **given: rate(step + 1, **given)


def cursor_one_further(samples: int) -> None:
    """Behind so many samples every rank reads on one sample too far, as after a resume with a wrong cursor."""
    from megatron_slm.data.loader import TrainLoader

    positions = TrainLoader.positions

    def further(self: Any, micro_batch: int, consumed_samples: int) -> range:
        found = positions(self, micro_batch, consumed_samples)
        return range(found.start + 1, found.stop + 1) if consumed_samples >= samples else found

    TrainLoader.positions = further  # type: ignore[method-assign]


def _strike_gradient(rank: int, strike: Callable[[torch.Tensor], torch.Tensor]) -> None:
    handles: list[Any] = []
    struck: list[bool] = []

    def once(gradient: torch.Tensor) -> torch.Tensor:
        struck.append(True)
        return strike(gradient) if len(struck) == 1 else gradient

    _add_hook(
        before_forward=_on(rank, lambda state: handles.append(_parameters(state)[STRUCK].register_hook(once))),
        after_backward=_on(rank, lambda state: [handle.remove() for handle in handles]),
    )


def _strike_output(rank: int, strike: Callable[[Any], Any], module: str) -> None:
    from megatron_slm.parallel.gradients import unwrap

    handles: list[Any] = []
    struck: list[bool] = []

    def once(own: Any, inputs: Any, output: Any) -> Any:
        struck.append(True)
        return strike(output) if len(struck) == 1 else output

    def begin(state: Any) -> None:
        found = dict(unwrap(state.chunks[0]).named_modules())[module]
        # In front of the recorder's own hook, which then sees what the next module gets.
        handles.append(found.register_forward_hook(once, prepend=True))

    _add_hook(
        before_forward=_on(rank, begin), after_backward=_on(rank, lambda state: [one.remove() for one in handles])
    )


def _change_batches(rank: int, change: Callable[[list[Any]], list[Any]]) -> None:
    from megatron_slm.data.loader import TrainLoader

    original, calls = TrainLoader.micro_batches, [0]

    def changed(self: Any, cursor: Any, size: int) -> Any:
        calls[0] += 1
        batches = list(original(self, cursor, size))
        return iter(change(batches) if calls[0] == STEP and dist.get_rank() == rank else batches)

    TrainLoader.micro_batches = changed  # type: ignore[method-assign]


def _around_update(rank: int, around: Callable[[Any, Callable[[], None]], None]) -> None:
    from megatron_slm.train import step

    update, states = step.apply_update, []

    def changed(optimizer: Any, norm: float) -> None:
        state = states[0]
        if state.step + 1 == STEP and dist.get_rank() == rank:
            around(state, lambda: update(optimizer, norm))
        else:
            update(optimizer, norm)

    step.apply_update = changed
    _add_hook(before_run=states.append)


def _on(rank: int, do: Callable[[Any], Any]) -> Callable[..., None]:
    """A hook's call that acts in ``STEP`` on one rank."""

    def act(state: Any, *rest: Any) -> None:
        if state.step + 1 == STEP and dist.get_rank() == rank:
            do(state)

    return act


def _add_hook(**calls: Callable[..., None]) -> None:
    """Let a run have one hook more, in front of all others."""
    from megatron_slm import run
    from megatron_slm.train.hook import Hook

    build, hook = run.build_hooks, Hook()
    for name, call in calls.items():
        setattr(hook, name, call)
    run.build_hooks = lambda *given, **named: [hook, *build(*given, **named)]


def _parameters(state: Any) -> dict[str, Any]:
    from megatron_slm.train.optimizer_state import named_parameters

    return dict(named_parameters(state.chunks))


def slot_gradient_bit(slot: int, bit: int = 6) -> None:
    """A persistent fault: one bit of the own gradient of whichever rank runs on a slot, in every step."""

    def before(state: Any) -> None:
        if int(os.environ["MSLM_SLOT"]) == slot:
            handles.append(_parameters(state)[STRUCK].register_hook(lambda gradient: flipped(gradient, bit)))

    handles: list[Any] = []
    _add_hook(
        before_forward=lambda state, inputs: before(state),
        after_backward=lambda state, inputs: [handle.remove() for handle in handles],
    )


def rotated_start(resolved: Any, places: int, plant: Callable[[], None] | None = None) -> int:
    """``runs.start`` with every rank moved on by so many slots, as ``mslm replay sdc`` starts its replays."""
    from tests import runs

    os.environ[ROTATION] = str(places)
    try:
        return runs.start(resolved, plant)
    finally:
        del os.environ[ROTATION]
