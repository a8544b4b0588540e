"""Functions of older releases, cut out of their wheels and executed: oracles of what TRL has no more or never had.

torchtune and verl cannot be imported beside a new torch, and TRL's PPO trainer is gone since 1.16; the functions that
matter are plain arithmetic on tensors. PPO is what all three agree on, where the conventions do not say otherwise.
"""

from __future__ import annotations

import ast
import math
import subprocess
import sys
import zipfile
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from oracle_inputs import LENGTHS, PROMPTS, TOKENS, Case, case, completion_mask, random
from torch import Tensor

RELEASES = {"trl": "0.11.4", "verl": "0.9.1", "torchtune": "0.6.1"}
ACTIONS = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 1, 1, 1, 0], [1, 1, 0, 0, 0]]).bool()
"""Four samples of at most five tokens."""


def download(directory: Path) -> Path:
    """The wheels of ``RELEASES``, without what they depend on."""
    pins = [f"{name}=={release}" for name, release in RELEASES.items()]
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(directory), *pins]
    subprocess.run(command, check=True)
    return directory


class Sources:
    """The unpacked wheels, and the functions of them that are asked."""

    def __init__(self, wheels: Path, directory: Path) -> None:
        for name, release in RELEASES.items():
            (wheel,) = wheels.glob(f"{name}-{release}-*.whl")
            zipfile.ZipFile(wheel).extractall(directory / name)
        self.versions = {f"{name} (source)": release for name, release in RELEASES.items()}
        self.torchtune = self._torchtune(directory / "torchtune" / "torchtune" / "rlhf")
        self.verl = self._verl(directory / "verl" / "verl")
        self.trl = self._trl(directory / "trl" / "trl")

    def smoothed_dpo(self, inputs: Case, beta: float, smoothing: float) -> Callable[[Tensor], Tensor]:
        """torchtune's DPO loss of the logits of ``oracle_inputs``."""

        def compute(logits: Tensor) -> Tensor:
            sums = [log_likelihoods(each) for each in (logits, inputs["ref_logits"].float())]
            sides = [each[side] for each in sums for side in ([0, 2], [1, 3])]
            stub = SimpleNamespace(beta=beta, label_smoothing=smoothing)
            return self.torchtune.dpo(stub, *sides)[0].mean()

        return compute

    @staticmethod
    def _torchtune(folder: Path) -> Any:
        rewards = functions(folder / "rewards.py")
        rlhf = SimpleNamespace(masked_mean=rewards.masked_mean)
        ppo_forward = functions(folder / "loss" / "ppo.py", within="PPOLoss", rlhf=rlhf).forward
        dpo_forward = functions(folder / "loss" / "dpo.py", within="DPOLoss").forward
        return SimpleNamespace(**vars(rewards), ppo=ppo_forward, dpo=dpo_forward)

    @staticmethod
    def _verl(folder: Path) -> Any:
        arithmetic = functions(folder / "utils" / "torch_functional.py", only="masked_ clip_by_value")
        return functions(
            folder / "trainer" / "ppo" / "core_algos.py",
            only="compute_gae compute_grpo_outcome compute_rloo_outcome compute_rewards agg_loss compute_value "
            "compute_policy_loss_vanilla compute_policy_loss_gspo compute_policy_loss_cispo kl_penalty",
            verl_F=arithmetic,
            defaultdict=defaultdict,
            ActorConfig=ActorConfig,
            AlgoConfig=type("AlgoConfig", (), {}),
        )

    @staticmethod
    def _trl(folder: Path) -> Any:
        arithmetic = functions(folder / "core.py", only="masked_ clip_by_value entropy_from_logits")
        return functions(
            folder / "trainer" / "ppo_trainer.py",
            only="compute_rewards compute_advantages loss _kl_penalty",
            flatten_dict=dict,
            **vars(arithmetic),
        )


class ActorConfig:
    """As much of verl's as its losses ask for."""

    def __init__(self, **values: Any) -> None:
        self.clip_ratio, self.clip_ratio_low, self.clip_ratio_high = 0.2, None, None
        self.global_batch_info: dict[str, Any] = {}
        vars(self).update(values)

    def get(self, name: str, default: Any) -> Any:
        return getattr(self, name, default)


def functions(path: Path, only: str = "", within: str | None = None, **names: Any) -> Any:
    """The functions and methods of a source file (of the class ``within``) whose names begin as one of ``only``."""
    found = []
    tree = ast.parse(path.read_text(encoding="utf-8"))
    classes = [node for node in ast.walk(tree) if isinstance(node, ast.ClassDef) and node.name == within]
    for node in ast.walk(classes[0] if within else tree):
        if isinstance(node, ast.FunctionDef) and node.name.startswith(tuple(only.split()) or ""):
            node.decorator_list, node.returns = [], None
            for argument in [*node.args.args, *node.args.kwonlyargs, node.args.kwarg]:
                if argument is not None:
                    argument.annotation = None
            found.append(node)
    surroundings: dict[str, Any] = {"torch": torch, "np": np, "math": math, "F": torch.nn.functional, **names}
    program = ast.Module(body=[ast.ImportFrom("__future__", [ast.alias("annotations")], 0), *found], type_ignores=[])
    exec(compile(ast.fix_missing_locations(program), str(path), "exec"), surroundings)
    return SimpleNamespace(**{node.name: surroundings[node.name] for node in found})


def log_likelihoods(logits: Tensor) -> Tensor:
    """[4]: sums over the completions of the logits [4, 6, V]."""
    logprobs = torch.log_softmax(logits[:, :-1], dim=-1)
    of_tokens = logprobs.gather(2, torch.tensor(TOKENS)[:, 1:, None])[..., 0]
    assert completion_mask().sum() == sum(LENGTHS) - sum(PROMPTS), "the mask is that of the completions"
    return (of_tokens * completion_mask()[:, 1:]).sum(1)


def ppo(sources: Sources) -> Case:
    """Policy and value losses, gradients with respect to the log-probabilities and the values."""
    inputs = {"mask": ACTIONS, "logprobs": -random(4, 5).abs() - 0.1}
    inputs |= {"old_logprobs": inputs["logprobs"] + random(4, 5, scale=0.4), "advantages": random(4, 5)}
    # One ratio beyond the dual clip, with a negative advantage.
    inputs["old_logprobs"][0, 1], inputs["advantages"][0, 1] = inputs["logprobs"][0, 1] - 1.5, -0.8
    inputs["group_advantages"] = random(4, 1).expand(4, 5)
    inputs |= {"values": random(4, 5), "old_values": random(4, 5, scale=0.7), "returns": random(4, 5)}
    given = SimpleNamespace(**{name: value.float() for name, value in inputs.items() if name != "mask"})
    cases = []
    for name, (stage, field, config, compute) in policy_losses(sources, given).items():
        made = case(name, name.split()[0], config, given.logprobs, compute)
        cases.append(made | {"stage": stage, "advantages": field})
    for name, compute in value_losses(sources, given).items():
        made = case(f"{name} value", name, {"ppo_value_coef": 0.1}, given.values, compute)
        cases.append(made | {"stage": "value", "advantages": "advantages"})
    return {"inputs": inputs, "cases": cases}


def policy_losses(sources: Sources, given: Any) -> dict[str, tuple[str, str, dict[str, Any], Callable[..., Tensor]]]:
    """Name -> our stage, the advantages' name, our section, and the loss of the log-probabilities."""

    def verl(name: str, advantages: Tensor) -> Callable[[Tensor], Tensor]:
        compute = getattr(sources.verl, f"compute_policy_loss_{name}")
        return lambda logprobs: compute(
            given.old_logprobs, logprobs, advantages, ACTIONS.float(), config=ActorConfig()
        )[0]

    by_group = {"grpo_convention": "verl"}
    groups = given.group_advantages
    return {
        "trl": ("ppo", "advantages", {}, lambda x: old_trl(sources, given, x, given.values)[0]),
        "torchtune": (
            "ppo",
            "advantages",
            {"ppo_convention": "torchtune"},
            lambda x: torchtune(sources, given, x, given.values, given.advantages, value_coefficient=0.0),
        ),
        "verl": ("ppo", "advantages", {"ppo_convention": "verl"}, verl("vanilla", given.advantages)),
        "verl dapo": ("grpo", "group_advantages", by_group, verl("vanilla", groups)),
        "verl gspo": ("grpo", "group_advantages", by_group | {"grpo_loss": "gspo"}, verl("gspo", groups)),
        "verl cispo": ("grpo", "group_advantages", by_group | {"grpo_loss": "cispo"}, verl("cispo", groups)),
    }


def value_losses(sources: Sources, given: Any) -> dict[str, Callable[[Tensor], Tensor]]:
    """Name -> the loss of the values, with the weight 0.1."""
    none = torch.zeros(4, 5)
    compute = sources.verl.compute_value_loss
    return {
        "trl": lambda x: old_trl(sources, given, given.logprobs, x)[1],
        "torchtune": lambda x: torchtune(sources, given, given.logprobs, x, none, value_coefficient=0.1),
        "verl": lambda x: 0.1 * compute(x, given.returns, given.old_values, ACTIONS.float(), 0.2)[0],
    }


def old_trl(sources: Sources, given: Any, logprobs: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Policy and value loss of TRL 0.11's PPOTrainer."""
    stub = SimpleNamespace(
        config=SimpleNamespace(cliprange=0.2, cliprange_value=0.2, vf_coef=0.1, ratio_threshold=10.0)
    )
    old, logits, mask = given.old_logprobs, torch.zeros(4, 5, 2), ACTIONS.float()
    found = sources.trl.loss(
        stub, old, given.old_values, logits, values, logprobs, mask, given.advantages, given.returns
    )
    return found[0], found[1]


def torchtune(  # noqa: PLR0913
    sources: Sources, given: Any, logprobs: Tensor, values: Tensor, advantages: Tensor, *, value_coefficient: float
) -> Tensor:
    """torchtune's PPOLoss, the sum of both."""
    stub = SimpleNamespace(epsilon=0.2, value_clip_range=0.2, value_coeff=value_coefficient)
    old = given.old_logprobs, given.old_values
    found = sources.torchtune.ppo(stub, old[0], logprobs, advantages, old[1], values, given.returns, ACTIONS, ACTIONS)
    return found[0]


def advantages(sources: Sources) -> Case:
    """From scores to whitened advantages and returns; groups; estimates of the distance."""
    inputs = {"mask": ACTIONS, "logprobs": -random(4, 5).abs(), "ref_logprobs": -random(4, 5).abs()}
    inputs |= {"values": random(4, 5), "scores": random(4), "rewards": random(3, 4)}
    given = SimpleNamespace(**inputs)
    found = {"trl": trl_advantages(sources, given, ACTIONS)}
    # With padding, its whitening makes rewards of the padding, which then reach the last tokens.
    full = torch.ones_like(ACTIONS)
    found["trl, whitened rewards"] = trl_advantages(sources, given, full, whiten_rewards=True)
    found["verl"] = verl_advantages(sources, given)
    found["torchtune"] = torchtune_advantages(sources, given)
    cases: list[Case] = [
        {"name": name, "kind": "ppo", "oracle": name.split(",")[0], "advantages": pair[0], "returns": pair[1]}
        for name, pair in found.items()
    ]
    index = np.repeat(np.arange(3), 4)
    outcomes, ones = given.rewards.flatten()[:, None], torch.ones(12, 1)
    settings: dict[str, dict[str, Any]] = {
        "group": {},
        "none": {"grpo_scale": "none"},
        "leave one out": {"grpo_scale": "none", "grpo_baseline": "leave_one_out"},
    }
    for name, config in settings.items():
        if "grpo_baseline" in config:
            answer = sources.verl.compute_rloo_outcome_advantage(outcomes.clone(), ones, index)[0]
        else:
            scaled = {"norm_adv_by_std_in_grpo": not config}
            answer = sources.verl.compute_grpo_outcome_advantage(outcomes.clone(), ones, index, **scaled)[0]
        made = {"name": f"verl {name}", "kind": "group", "oracle": "verl", "advantages": answer.view(3, 4)}
        cases.append(made | {"config": config | {"grpo_convention": "verl"}})
    for estimator in ("k1", "k2", "k3", "abs"):
        answer = sources.verl.kl_penalty(given.logprobs, given.ref_logprobs, estimator)
        cases.append({"name": estimator, "kind": "kl", "oracle": "verl", "config": {}, "advantages": answer})
    return {"inputs": inputs, "cases": cases}


KL_COEFFICIENT, GAMMA, LAMBDA = 0.1, 0.97, 0.9


def trl_advantages(
    sources: Sources, given: Any, actions: Tensor, *, whiten_rewards: bool = False
) -> tuple[Tensor, Tensor]:
    """TRL 0.11: price, score, generalised advantages, whitening."""
    config = SimpleNamespace(kl_penalty="kl", whiten_rewards=whiten_rewards, gamma=GAMMA, lam=LAMBDA)
    stub = SimpleNamespace(config=config, kl_ctl=SimpleNamespace(value=KL_COEFFICIENT))
    stub._kl_penalty = lambda *logprobs: sources.trl._kl_penalty(stub, *logprobs)
    mask = actions.double()
    rewards = sources.trl.compute_rewards(stub, given.scores, given.logprobs, given.ref_logprobs, mask)[0]
    _, found, returns = sources.trl.compute_advantages(stub, given.values, rewards, mask)
    return found * mask, returns * mask


def verl_advantages(sources: Sources, given: Any) -> tuple[Tensor, Tensor]:
    """verl: the score at the last token is its caller's."""
    mask, last = ACTIONS.double(), ACTIONS.sum(1, keepdim=True) - 1
    scores = torch.zeros(4, 5, dtype=torch.float64).scatter(1, last, given.scores[:, None])
    rewards = sources.verl.compute_rewards(scores, given.logprobs, given.ref_logprobs, KL_COEFFICIENT)
    found, returns = sources.verl.compute_gae_advantage_return(rewards, given.values, mask, GAMMA, LAMBDA)
    return found * mask, returns * mask


def torchtune_advantages(sources: Sources, given: Any) -> tuple[Tensor, Tensor]:
    """torchtune: padding is its caller's; whitening adds the mean back."""
    mask, last = ACTIONS.double(), ACTIONS.sum(1) - 1
    compute = sources.torchtune.get_rewards_ppo
    rewards = compute(given.scores, given.logprobs, given.ref_logprobs, KL_COEFFICIENT, last)[0]
    estimate = sources.torchtune.estimate_advantages
    found, returns = estimate(given.values * mask, rewards * mask, GAMMA, LAMBDA, ACTIONS)
    return found * mask, returns * mask
