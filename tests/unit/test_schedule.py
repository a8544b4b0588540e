"""The learning rate is core's OptimizerParamScheduler, step for step, as a pure function."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from megatron_slm.train.config import OptimizerConfig, ScheduleConfig
from megatron_slm.train.schedule import learning_rate

STYLES: list[dict[str, Any]] = [
    {"lr_decay_style": "constant"},
    {"lr_decay_style": "linear"},
    {"lr_decay_style": "cosine"},
    {"lr_decay_style": "inverse-square-root"},
    *(
        {"lr_decay_style": "WSD", "lr_wsd_decay_style": shape, "lr_wsd_decay_iters": 17}
        for shape in ("linear", "cosine", "exponential", "minus_sqrt")
    ),
]


@pytest.mark.parametrize("decay_iters", [None, 60])
@pytest.mark.parametrize("warmup", [0, 1, 13])
@pytest.mark.parametrize("style", STYLES, ids=lambda style: "-".join(str(value) for value in style.values()))
def test_equals_the_scheduler_of_core(style: dict[str, Any], warmup: int, decay_iters: int | None) -> None:
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

    schedule = ScheduleConfig(**style, lr_warmup_iters=warmup, lr_decay_iters=decay_iters)
    optimizer, train_iters = OptimizerConfig(lr=3e-3, min_lr=1e-4), 80
    groups: list[dict[str, Any]] = [{}]
    core = OptimizerParamScheduler(
        SimpleNamespace(param_groups=groups),  # what core reads of an optimizer
        init_lr=0.0,
        max_lr=optimizer.lr,
        min_lr=optimizer.min_lr,
        lr_warmup_steps=warmup,
        lr_decay_steps=decay_iters or train_iters,
        lr_decay_style=schedule.lr_decay_style,
        start_wd=0.1,
        end_wd=0.1,
        wd_incr_steps=train_iters,
        wd_incr_style="constant",
        wsd_decay_steps=schedule.lr_wsd_decay_iters,
        lr_wsd_decay_style=schedule.lr_wsd_decay_style,
    )
    for step in range(train_iters + 5):
        assert learning_rate(step, schedule, optimizer, train_iters) == groups[0]["lr"], f"step {step}"
        core.step(1)


def test_the_shape_in_numbers() -> None:
    schedule = ScheduleConfig(lr_decay_style="cosine", lr_warmup_iters=10)
    optimizer = OptimizerConfig(lr=1.0, min_lr=0.1)
    assert learning_rate(0, schedule, optimizer, 110) == 0.0
    assert learning_rate(5, schedule, optimizer, 110) == 0.5
    assert learning_rate(10, schedule, optimizer, 110) == 1.0
    assert learning_rate(60, schedule, optimizer, 110) == pytest.approx(0.55)
    assert learning_rate(110, schedule, optimizer, 110) == pytest.approx(0.1)
    assert learning_rate(111, schedule, optimizer, 110) == 0.1


def test_a_run_of_no_steps_has_a_learning_rate() -> None:
    assert learning_rate(0, ScheduleConfig(), OptimizerConfig(lr=1.0), 0) == 1.0


def test_wsd_without_its_length_is_a_mistake_of_the_caller() -> None:
    with pytest.raises(AssertionError, match="lr_wsd_decay_iters"):
        learning_rate(5, ScheduleConfig(lr_decay_style="WSD"), OptimizerConfig(), 10)
