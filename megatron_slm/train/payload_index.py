"""What a checkpoint's payload holds and where: torch's ``.metadata`` read without running anything in it. No torch.

``.metadata`` is a pickle, and a pickle may call any function of any module. The unpickler below knows a handful of
names, the ones torch's checkpoints consist of, and puts a class of its own in the place of each; any other name is
refused. So nothing of torch, or of anybody else, is created or called while a file is read that a stranger may have
written.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from megatron_slm.errors import CheckpointError
from megatron_slm.parallel.partition import ROOTS
from megatron_slm.train.manifest import read_regular

METADATA_FILE = ".metadata"
_DCP = "torch.distributed.checkpoint"

DTYPE_BYTES: Mapping[str, int] = {
    **dict.fromkeys(("float64", "int64"), 8),
    **dict.fromkeys(("float32", "int32"), 4),
    **dict.fromkeys(("float16", "bfloat16", "int16"), 2),
    **dict.fromkeys(("int8", "uint8", "bool", "float8_e4m3fn", "float8_e5m2"), 1),
}
"""Every dtype a tensor may have, by torch's name, and the bytes of one element."""


class Span(NamedTuple):
    """Bytes of one of the payload's files."""

    file: str
    start: int
    length: int


class Chunk(NamedTuple):
    """A block of a tensor: where it lies in the whole, its shape, and its bytes."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    span: Span


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of the payload; ``shape`` is global."""

    dtype: str
    shape: tuple[int, ...]
    chunks: tuple[Chunk, ...]

    @property
    def num_elements(self) -> int:
        """Elements of the whole tensor."""
        count = 1
        for size in self.shape:
            count *= size
        return count

    @property
    def num_bytes(self) -> int:
        """Bytes of the whole tensor in memory."""
        return self.num_elements * DTYPE_BYTES[self.dtype]


@dataclass(frozen=True)
class PayloadIndex:
    """Every tensor, and every other object (random states, layers' extra states), by its global name."""

    tensors: Mapping[str, StoredTensor]
    objects: Mapping[str, Span]


def group_of(name: str) -> str:
    """What a name of the payload belongs to: "optimizer", "random", a part's name ("ema"), or "weights"."""
    first = name.partition(".")[0].partition("/")[0]
    return "weights" if first in ROOTS else first


def is_weight(name: str) -> bool:
    """Whether a name is of the model itself."""
    return group_of(name) == "weights"


def read_index(path: Path) -> PayloadIndex:
    """The index of the checkpoint in ``path``.

    Raises:
        CheckpointError: ``.metadata`` is missing or damaged, or names something that has no place in one.
    """
    file = path / METADATA_FILE
    try:
        return _index(_Unpickler(io.BytesIO(read_regular(file))).load())
    except CheckpointError as error:
        raise CheckpointError(f"{file} is refused: {error}") from error
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} holds no payload: {file.name} is missing; choose another checkpoint") from error
    except Exception as error:  # a damaged pickle raises nearly anything
        raise CheckpointError(f"{file} is damaged ({error!r}); choose another checkpoint") from error


class _Unpickler(pickle.Unpickler):
    """Reads names as stand-ins. They are made for each file anew: a pickle can change the classes it is given."""

    def __init__(self, stream: io.BytesIO) -> None:
        super().__init__(stream)
        self._known = _stand_ins()

    def find_class(self, module: str, name: str) -> Any:
        """The stand-in of a name; nothing is imported.

        Raises:
            CheckpointError: the name is not one of a checkpoint's index.
        """
        if (module, name) in self._known:
            return self._known[module, name]
        if module == "torch" and name in DTYPE_BYTES:
            return name
        raise CheckpointError(
            f"it names {module}.{name}, which no checkpoint needs and which might run when loaded; nothing was run. "
            "Use a checkpoint from a source you trust"
        )


def _stand_ins() -> dict[tuple[str, str], Any]:
    """Module and name -> what is created or called instead."""

    class Fields:
        """Takes the place of a data class: an object with attributes."""

    class Properties:
        """Takes the place of ``TensorProperties``, which pickles itself as a tuple that begins with its dtype."""

        dtype: object = None

        def __setstate__(self, state: tuple[object, ...]) -> None:
            self.dtype = state[0]

    plain = {
        f"{_DCP}.metadata": (
            "Metadata", "TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata", "MetadataIndex",
            "StorageMeta",
        ),
        f"{_DCP}.filesystem": ("_StorageInfo",),
    }  # fmt: skip
    return {
        **{(module, name): type(name, (Fields,), {}) for module, names in plain.items() for name in names},
        (f"{_DCP}.metadata", "TensorProperties"): Properties,
        (f"{_DCP}.metadata", "_MEM_FORMAT_ENCODING"): lambda value: value,
        ("torch.serialization", "_get_layout"): lambda name: name,
        ("torch", "Size"): lambda sizes=(): tuple(sizes),
        ("pathlib", "PosixPath"): lambda *parts: "/".join(parts),
        ("pathlib._local", "PosixPath"): lambda *parts: "/".join(parts),
    }


def _index(metadata: Any) -> PayloadIndex:
    """Stand-ins -> index; every value is checked to be what it should be."""
    spans = {(key.fqn, getattr(key, "offset", None)): _span(info) for key, info in metadata.storage_data.items()}
    tensors, objects = {}, {}
    for name, stored in metadata.state_dict_metadata.items():
        if type(stored).__name__ == "BytesStorageMetadata":
            objects[_text(name)] = spans[name, None]
            continue
        dtype = stored.properties.dtype
        if dtype not in DTYPE_BYTES:
            raise CheckpointError(f"tensor {name} has the dtype {dtype!r}")
        chunks = tuple(
            Chunk(_sizes(chunk.offsets), _sizes(chunk.sizes), spans[name, chunk.offsets]) for chunk in stored.chunks
        )
        tensors[_text(name)] = StoredTensor(dtype, _sizes(stored.size), chunks)
    return PayloadIndex(tensors, objects)


def _span(info: Any) -> Span:
    file, start, length = _text(info.relative_path), *_sizes((info.offset, info.length))
    # A path out of the checkpoint would read bytes that no manifest has hashed.
    if Path(file).name != file or not file.endswith(".distcp"):
        raise CheckpointError(f"it points to {file!r}, which is not a file of the payload")
    if getattr(info, "transform_descriptors", None):
        raise CheckpointError(f"{file} is compressed or encrypted, which this program does not read")
    return Span(file, start, length)


def _sizes(values: Any) -> tuple[int, ...]:
    if not all(type(value) is int and value >= 0 for value in values):
        raise CheckpointError(f"{values!r} are not sizes")
    return tuple(values)


def _text(value: Any) -> str:
    if type(value) is not str:
        raise CheckpointError(f"{value!r} is not a name")
    return value
