"""What can be profiled: steps, ranks and tools as they are typed, and what is refused."""

from __future__ import annotations

import pytest

from megatron_slm.cli import main
from megatron_slm.config.load import load
from megatron_slm.config.rules import violations
from megatron_slm.errors import ConfigError
from megatron_slm.profile.config import Steps

TINY = ("preset=tiny", "data.data_path=corpus", "train.train_iters=20")


def refused(*overrides: str, world_size: int = 4) -> str:
    resolved = load(None, [*TINY, "parallel.tensor_model_parallel_size=2", *overrides])
    return "\n".join(text for text in violations(resolved.config, world_size) if "profile." in text)


@pytest.mark.parametrize(("text", "steps"), [("10:12", (10, 12)), ("7", (7, 7)), ("3:3", (3, 3))])
def test_steps(text: str, steps: tuple[int, int]) -> None:
    assert Steps.parse(text) == steps


@pytest.mark.parametrize("text", ["", "0", "3:2", "a", "1:", ":3", "1:2:3", "-1", "1.5", "0:4"])
def test_what_is_no_steps(text: str) -> None:
    with pytest.raises(ConfigError, match="10:12"):
        Steps.parse(text)


def test_a_profile_that_can_be_made_is_accepted() -> None:
    assert refused() == ""
    assert (
        refused("profile.profile_steps=18:20", "profile.profile_ranks=0,3", "profile.profile_tools=torch,memory") == ""
    )
    assert refused("profile.profile_steps=1", "profile.profile_ranks=all") == ""


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["profile.profile_steps=20:21"], "train.train_iters = 20"),
        (["profile.profile_steps=x"], "names no steps"),
        (["profile.profile_ranks=all"], "nothing is profiled without profile.profile_steps"),
        (["profile.profile_steps=2", "profile.profile_ranks=0,4"], "4 is no rank of this job; its ranks are 0 to 3"),
        (["profile.profile_steps=2", "profile.profile_tools=nsight"], "nsight is none of torch, nsys-capture, memory"),
        (["profile.profile_steps=2", "profile.profile_tools=torch,nsys-capture"], "CUPTI"),
    ],
)
def test_what_is_refused(overrides: list[str], said: str) -> None:
    assert said in refused(*overrides)


def test_the_verb_refuses_before_any_rank_is_started(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["profile", *TINY[:1], "train.train_iters=5", "--steps", "6"]) == 2
    assert "profile.profile_steps" in capsys.readouterr().err
    assert main(["profile", *TINY]) == 2, "which steps?"
