"""What pretraining gives to core and to the log."""

from __future__ import annotations

import pytest
import torch

from megatron_slm.model.config import ModelConfig
from megatron_slm.stages import pretrain
from megatron_slm.train.config import TrainConfig

SUMS = torch.tensor([30.0, 24.0, 100.0])
BATCH = {"loss_mask": torch.tensor([[1.0, 0.0, 1.0, 1.0]])}


@pytest.mark.parametrize(
    ("train", "expected"),
    [
        (TrainConfig(), {"lm loss": 24.0}),
        (TrainConfig(label_smoothing=0.1), {"lm loss": 24.0, "objective": 30.0}),
        (TrainConfig(z_loss_coefficient=0.5), {"lm loss": 24.0, "objective": 30.0, "z loss": 50.0}),
    ],
)
def test_logs_the_objective_only_where_it_differs(train: TrainConfig, expected: dict[str, float]) -> None:
    _, tokens, logged = pretrain.loss_function(train, ModelConfig())(SUMS, BATCH)
    assert tuple(logged) == pretrain.logged(train, ModelConfig())
    assert {name: pair.tolist() for name, pair in logged.items()} == {name: [x, 3.0] for name, x in expected.items()}
    assert tokens == 3


def test_every_depth_of_prediction_is_logged_over_its_own_tokens() -> None:
    model, output = ModelConfig(mtp_num_layers=2), torch.cat([SUMS, torch.tensor([12.0, 2.0, 5.0, 1.0])])
    _, _, logged = pretrain.loss_function(TrainConfig(), model)(output, BATCH)
    assert tuple(logged) == pretrain.logged(TrainConfig(), model)
    found = {name: pair.tolist() for name, pair in logged.items()}
    assert found == {"lm loss": [24, 3], "objective": [30, 3], "mtp_1 loss": [12, 2], "mtp_2 loss": [5, 1]}
    _, _, evaluated = pretrain.loss_function(TrainConfig(), model)(SUMS, BATCH)
    assert set(evaluated) == {"lm loss", "objective"}


def test_the_minimised_number_is_no_view() -> None:
    """With a pipeline on a GPU, core frees what it was given, and asserts that it is not a view."""
    sums = SUMS.clone().requires_grad_()
    minimised = pretrain.loss(sums * 1.0, BATCH)[0]
    assert minimised._base is None and minimised.item() == 30.0
    minimised.backward()  # type: ignore[no-untyped-call]
    assert sums.grad is not None and sums.grad.tolist() == [1.0, 0.0, 0.0]
