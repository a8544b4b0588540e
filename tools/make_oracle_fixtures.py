"""Golden losses and gradients of other people's code, for tests/unit/test_stage_oracles.py.

    python3.11 -m venv ORACLE && ORACLE/bin/pip install -e '.[oracle,oracle-trl]'
    ORACLE/bin/python tools/make_oracle_fixtures.py

Run by hand, in an environment of its own, when a loss gets a new option or TRL a new release. The inputs are made here.
TRL's trainers run on a model whose hidden states are our logits and whose output matrix is the identity, so that a
gradient with respect to the logits comes out. What TRL has no more, or never had, comes from functions cut out of the
sources of older releases (``oracle_sources.py``), which are downloaded, executed and forgotten: none of it is kept.
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import oracle_sources
import torch
from oracle_inputs import (
    LENGTHS,
    PROMPTS,
    TOKENS,
    VOCABULARY,
    Case,
    attention_mask,
    case,
    completion_mask,
    give,
    model,
    numbers,
    random,
    sequences,
    settings,
    text_rows,
    tokenizer,
)
from torch import Tensor

OUT = Path(__file__).resolve().parents[1] / "tests" / "fixtures" / "oracles"


def main() -> None:
    """Write one file a stage."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=OUT, help="folder of the fixtures")
    parser.add_argument(
        "--sources", type=Path, help="folder of wheels of the older releases; default they are downloaded"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    arguments.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as directory:
        wheels = arguments.sources or oracle_sources.download(Path(directory, "wheels"))
        sources = oracle_sources.Sources(wheels, Path(directory))
        stages: dict[str, Callable[[], Case]] = {
            "sft": lambda: sft(Path(directory)),
            "reward": lambda: reward(Path(directory)),
            "dpo": lambda: dpo(Path(directory), sources),
            "grpo": lambda: grpo(Path(directory)),
            "distill": distill,
            "ppo": lambda: oracle_sources.ppo(sources),
            "advantages": lambda: oracle_sources.advantages(sources),
        }
        for name, make in stages.items():
            torch.manual_seed(1234)
            fixture = {"versions": versions() | sources.versions, **make()}
            path = arguments.out / f"{name}.json"
            path.write_text(json.dumps(fixture, separators=(",", ":"), default=numbers) + "\n")
            print(f"{path}: {len(fixture['cases'])} cases, {path.stat().st_size} bytes")


def versions() -> dict[str, str]:
    """What computed the fixtures."""
    names = ("trl", "torch", "transformers")
    return {"python": platform.python_version()} | {name: version(name) for name in names}


def sft(directory: Path) -> Case:
    """Negative log-likelihood and DFT."""
    from trl import SFTConfig, SFTTrainer

    inputs, cases = sequences(), []
    for kind in ("nll", "dft"):
        args = SFTConfig(**settings(directory), max_length=16, loss_type=kind)
        made = model()
        rows = text_rows("prompt", "completion")
        trainer = SFTTrainer(model=made, args=args, train_dataset=rows, processing_class=tokenizer())
        labels = torch.tensor(TOKENS).masked_fill(completion_mask() == 0, -100)

        def compute(logits: Tensor, trainer: Any = trainer, labels: Tensor = labels) -> Tensor:
            give(trainer.model, logits)
            batch = {"input_ids": torch.tensor(TOKENS), "attention_mask": attention_mask(), "labels": labels}
            return trainer.compute_loss(trainer.model, batch)

        cases.append(case(kind, "trl", {"sft_loss": kind}, inputs["logits"], compute))
    return {"inputs": inputs, "cases": cases}


def reward(directory: Path) -> Case:
    """Bradley-Terry, with margin, with centring. Pairs are sequences (0, 1) and (2, 3); TRL wants the chosen first."""
    from trl import RewardConfig, RewardTrainer

    inputs = {"tokens": TOKENS, "lengths": LENGTHS, "prompts": PROMPTS, "values": random(4, 6)}
    inputs["margins"] = random(2).abs()
    order, cases = [0, 2, 1, 3], []
    for name, center, margin in (("plain", 0.0, False), ("center", 0.01, False), ("margin", 0.0, True)):
        args = RewardConfig(**settings(directory), center_rewards_coefficient=center or None)
        rows = text_rows("chosen", "rejected")
        trainer = RewardTrainer(model=model(True), args=args, train_dataset=rows, processing_class=tokenizer())

        def compute(values: Tensor, trainer: Any = trainer, margin: bool = margin) -> Tensor:
            hidden = torch.cat([values[order, :, None], torch.zeros(4, 6, VOCABULARY)], dim=-1)
            give(trainer.model, hidden)
            batch = {"input_ids": torch.tensor(TOKENS)[order], "attention_mask": attention_mask()[order]}
            batch |= {"margin": inputs["margins"].float()} if margin else {}
            return trainer.compute_loss(trainer.model, batch)

        config = {"center_rewards_coefficient": center, "reward_margin": margin}
        cases.append(case(name, "trl", config, inputs["values"], compute))
    return {"inputs": inputs, "cases": cases}


DPO_CASES: dict[str, tuple[list[str], list[float], float, dict[str, Any]]] = {
    "sigmoid": (["sigmoid"], [1.0], 0.0, {}),
    "sigmoid_norm": (["sigmoid_norm"], [1.0], 0.0, {"dpo_loss": "sigmoid_norm"}),
    "ipo": (["ipo"], [1.0], 0.0, {"dpo_loss": "ipo"}),
    "robust": (["robust"], [1.0], 0.1, {"dpo_loss": "robust", "dpo_label_smoothing": 0.1}),
    "apo_zero": (["apo_zero"], [1.0], 0.0, {"dpo_loss": "apo_zero"}),
    "sigmoid+sft": (["sigmoid", "sft"], [1.0, 0.2], 0.0, {"dpo_sft_weight": 0.2}),
    "ipo+sft": (["ipo", "sft"], [1.0, 0.5], 0.0, {"dpo_loss": "ipo", "dpo_sft_weight": 0.5}),
}
"""Name -> TRL's loss types, their weights and label smoothing, and our section."""


def dpo(directory: Path, sources: Any) -> Case:
    """Pairs as in ``reward``; label smoothing of the plain loss is torchtune's, as TRL 1.16 has it in robust alone."""
    from trl import DPOConfig, DPOTrainer

    inputs = sequences() | {"ref_logits": random(4, 6, VOCABULARY, scale=1.5)}
    order, cases = [0, 2, 1, 3], []
    for name, (kinds, weights, smoothing, ours) in DPO_CASES.items():
        for beta in (0.1, 0.5):
            args = DPOConfig(
                **settings(directory), beta=beta, loss_type=kinds, loss_weights=weights, label_smoothing=smoothing
            )
            rows = text_rows("prompt", "chosen", "rejected")
            trainer = DPOTrainer(
                model=model(), ref_model=model(), args=args, train_dataset=rows, processing_class=tokenizer()
            )

            def compute(logits: Tensor, trainer: Any = trainer) -> Tensor:
                give(trainer.model, logits[order])
                give(trainer.ref_model, inputs["ref_logits"].float()[order])
                batch = {
                    "input_ids": torch.tensor(TOKENS)[order],
                    "attention_mask": attention_mask()[order],
                    "completion_mask": completion_mask()[order],
                }
                return trainer._compute_loss(trainer.model, batch, return_outputs=False)

            cases.append(case(f"{name} beta {beta}", "trl", ours | {"dpo_beta": beta}, inputs["logits"], compute))
    smoothed = {"dpo_beta": 0.3, "dpo_label_smoothing": 0.1}
    cases.append(case("cdpo", "torchtune", smoothed, inputs["logits"], sources.smoothed_dpo(inputs, 0.3, 0.1)))
    return {"inputs": inputs, "cases": cases}


def grpo(directory: Path) -> Case:
    """The policy losses: TRL scores the samples itself (old, reference, advantages), then computes its loss."""
    inputs = sequences()
    for name, scale in (("old_logits", 0.2), ("ref_logits", 0.5), ("generation_logits", 0.4)):
        inputs[name] = inputs["logits"] + random(4, 6, VOCABULARY, scale=scale)
    inputs["rewards"] = torch.tensor([[1.0, 0.25], [-0.5, 0.75]])
    cases = []
    for name, (theirs, mode, ours) in GRPO_CASES.items():
        trainer = grpo_trainer(directory, inputs["rewards"].flatten().tolist(), theirs)
        batch = scored(trainer, inputs, mode)

        def compute(logits: Tensor, trainer: Any = trainer, batch: Any = batch) -> Tensor:
            give(trainer.model, left_padded(logits))
            return trainer._compute_loss(trainer.model, batch)

        made = case(name, "trl", ours, inputs["logits"], compute)
        cases.append(made | {"advantages": batch["advantages"], "temperature": theirs.get("temperature", 1.0)})
    return {"inputs": inputs, "cases": cases}


KL = {"beta": 0.3}
OUR_KL = {"grpo_kl_beta": 0.3}
BY_SEQUENCE = {"loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon": 0.05}
GSPO = {"grpo_loss": "gspo", "grpo_clamp_eps_lower": 0.05}
GRPO_CASES: dict[str, tuple[dict[str, Any], str | None, dict[str, Any]]] = {
    "dapo": ({"loss_type": "dapo"}, None, {}),
    "grpo": ({"loss_type": "grpo"}, None, {"grpo_loss": "grpo"}),
    "dr_grpo": ({"loss_type": "dr_grpo"}, None, {"grpo_loss": "dr_grpo", "grpo_completion_length": 8}),
    "gspo": (BY_SEQUENCE, None, GSPO),
    "cispo": (
        {"loss_type": "cispo", "epsilon_high": 1.1},
        None,
        {"grpo_loss": "cispo", "grpo_clamp_eps_upper": 1.1},
    ),
    "two clips": (
        {"epsilon": 0.05, "epsilon_high": 0.3},
        None,
        {"grpo_clamp_eps_lower": 0.05, "grpo_clamp_eps_upper": 0.3},
    ),
    "delta": ({"epsilon": 0.1, "delta": 1.15}, None, {"grpo_clamp_eps_lower": 0.1, "grpo_dual_clip": 1.15}),
    "kl": (KL, None, OUR_KL),
    "kl, grpo": (KL | {"loss_type": "grpo"}, None, OUR_KL | {"grpo_loss": "grpo"}),
    "kl, gspo": (KL | BY_SEQUENCE, None, OUR_KL | GSPO),
    "kl without ratio": (
        KL | {"use_bias_correction_kl": False},
        None,
        OUR_KL | {"grpo_kl_bias_correction": False},
    ),
    "entropy": ({"entropy_coef": 0.2}, None, {"grpo_entropy_coef": 0.2}),
    "temperature": ({"temperature": 0.7}, None, {}),
    "scale batch": ({"scale_rewards": "batch"}, None, {"grpo_scale": "batch"}),
    "scale none": ({"scale_rewards": "none"}, None, {"grpo_scale": "none"}),
} | {
    mode: (KL, mode, OUR_KL | {"grpo_is_correction": mode, "grpo_is_cap": 1.1})
    for mode in ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask")
}
"""Name -> TRL's settings, its correction for vLLM, and our section."""


def grpo_trainer(directory: Path, rewards: list[float], theirs: dict[str, Any], samples: int = 2) -> Any:
    """A trainer whose samples have the given rewards, ``samples`` of each prompt."""
    from trl import GRPOConfig, GRPOTrainer

    args = GRPOConfig(
        **settings(directory),
        num_generations=samples,
        per_device_train_batch_size=len(rewards),
        max_completion_length=8,
        num_iterations=2,  # so that the old log-probabilities are computed
        **{"loss_type": "dapo", **theirs},
    )
    made = model()
    # TRL loads its reference from where the model was.
    made.save_pretrained(directory / "reference")
    made.config._name_or_path = str(directory / "reference")
    trainer = GRPOTrainer(
        model=made,
        reward_funcs=lambda completions, **_: rewards,
        args=args,
        train_dataset=text_rows("prompt"),
        processing_class=tokenizer(),
    )
    trainer.current_gradient_accumulation_steps = 1
    return trainer


def scored(trainer: Any, inputs: Case, mode: str | None) -> Case:
    """TRL's batch of the samples that are given to it in the place of its generation."""
    prompts = [tokens[:start] for tokens, start in zip(TOKENS, PROMPTS, strict=True)]
    completions = [tokens[start:end] for tokens, start, end in zip(TOKENS, PROMPTS, LENGTHS, strict=True)]
    generated = torch.log_softmax(inputs["generation_logits"].float(), dim=-1)
    logprobs = [
        [generated[row, place - 1, TOKENS[row][place]].item() for place in range(PROMPTS[row], LENGTHS[row])]
        for row in range(len(TOKENS))
    ]
    texts = ["w1"] * len(TOKENS)
    trainer._generate = lambda _: (prompts, completions, None, texts, logprobs if mode else None, {}, None, None)
    if mode:
        trainer.use_vllm = trainer.vllm_importance_sampling_correction = True
        trainer.vllm_importance_sampling_mode, trainer.vllm_importance_sampling_clip_max = mode, 1.1
    give(trainer.model, left_padded(inputs["old_logits"].float()))
    if trainer.ref_model is not None:
        give(trainer.ref_model, left_padded(inputs["ref_logits"].float()))
    return trainer._generate_and_score_completions([{"prompt": text} for text in texts])


def left_padded(logits: Tensor) -> Tensor:
    """[4, 6, V] -> [4, P + C, V]: TRL pads prompts on the left and completions on the right."""
    widest, longest = max(PROMPTS), max(end - start for start, end in zip(PROMPTS, LENGTHS, strict=True))
    rows = []
    for row, start, end in zip(logits, PROMPTS, LENGTHS, strict=True):
        before, after = widest - start, widest + longest - (widest - start) - end
        rows.append(torch.nn.functional.pad(row[:end], (0, 0, before, after)))
    return torch.stack(rows)


def distill() -> Case:
    """TRL's chunked divergence, forward and reverse KL and JSD, at two temperatures."""
    from trl.trainer.distillation_trainer import _chunked_divergence_loss

    inputs = sequences() | {"teacher_logits": random(4, 6, VOCABULARY, scale=1.5)}
    eye, mask, cases = torch.eye(VOCABULARY), completion_mask()[:, 1:], []
    for beta in (0.0, 0.3, 0.5, 1.0):
        for temperature in (1.0, 2.0):

            def compute(logits: Tensor, beta: float = beta, temperature: float = temperature) -> Tensor:
                teacher = inputs["teacher_logits"].float()[:, :-1]
                found = _chunked_divergence_loss(logits[:, :-1], teacher, eye, eye, mask, beta, temperature=temperature)
                return found[0]

            ours = {"distill_beta": beta, "distill_temperature": temperature}
            cases.append(case(f"beta {beta} temperature {temperature}", "trl", ours, inputs["logits"], compute))
    return {"inputs": inputs, "cases": cases}


if __name__ == "__main__":
    main()
