"""The weights of a Hugging Face directory, read tensor by tensor from its safetensors files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_slm.errors import CheckpointError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
DTYPES: Mapping[str, str] = {"F64": "float64", "F32": "float32", "BF16": "bfloat16", "F16": "float16"}
"""Formats of weights: the name in a safetensors header, and torch's."""

WAY_OUT = "save the model with save_pretrained of transformers 5, or download it anew"


@dataclass(frozen=True)
class Described:
    """What a file's header says of one tensor."""

    file: Path
    shape: tuple[int, ...]
    dtype: str


class ModelFiles:
    """The tensors of ``directory`` by name. Opening reads the headers alone.

    Attributes:
        described: name -> file, shape and dtype.

    Raises:
        CheckpointError: there are no safetensors, or one is missing, damaged, or not what the index says.
    """

    def __init__(self, directory: Path) -> None:
        self.described: dict[str, Described] = {}
        for file, expected in _files(directory).items():
            found = _headers(file)
            if expected is not None and (wrong := sorted(set(found) ^ expected)):
                raise CheckpointError(
                    f"{file} and {INDEX} do not agree on {wrong[0]} (and {len(wrong) - 1} more); {WAY_OUT}"
                )
            self.described |= found

    def read(self, name: str) -> Tensor:
        """One whole tensor. The file is opened for it alone: of a mapped one, what was read would stay in memory."""
        file = self.described[name].file
        try:
            with safe_open(str(file), framework="pt", device="cpu") as stream:
                tensor: Tensor = stream.get_tensor(name)
                return tensor
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{file} is damaged at {name} ({error}); {WAY_OUT}") from error


def _files(directory: Path) -> dict[Path, set[str] | None]:
    """The safetensors files, and the names that the index puts into each; None without an index."""
    index = directory / INDEX
    if index.is_file():
        try:
            places = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            names = {file: {name for name, place in places.items() if place == file} for file in places.values()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{index} is damaged ({error!r}); {WAY_OUT}") from error
        for name in names:
            if Path(name).name != name:
                raise CheckpointError(f"{index} names {name!r}, which is no file beside it; {WAY_OUT}")
        return {directory / name: inside for name, inside in sorted(names.items())}
    if (directory / SINGLE).is_file():
        return {directory / SINGLE: None}
    if not directory.is_dir():
        raise CheckpointError(f"there is no directory {directory}; name that of a Hugging Face model")
    if pickles := sorted(path.name for path in directory.glob("pytorch_model*.bin*")):
        raise CheckpointError(
            f"{directory} holds its weights as {pickles[0]}, a pickle that may run anything when it is read; "
            "safetensors "
            "alone are read: load it with transformers where you trust it, and save_pretrained writes safetensors"
        )
    raise CheckpointError(f"{directory} holds neither {SINGLE} nor {INDEX}; {WAY_OUT}")


def _headers(file: Path) -> dict[str, Described]:
    """What a file says it holds."""
    try:
        with safe_open(str(file), framework="pt", device="cpu") as stream:
            return {name: _described(file, stream.get_slice(name)) for name in sorted(stream.keys())}
    except FileNotFoundError as error:
        raise CheckpointError(f"{file} is missing, which {INDEX} names; {WAY_OUT}") from error
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file} is damaged or no safetensors file ({error}); {WAY_OUT}") from error


def _described(file: Path, piece: Any) -> Described:
    return Described(file, tuple(piece.get_shape()), DTYPES.get(piece.get_dtype(), piece.get_dtype()))
