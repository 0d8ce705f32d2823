"""Megatron-Core's torch_dist checkpoints, read and written a piece of a tensor at a time.

The format is torch.distributed.checkpoint's: ``.metadata``, a pickle that says which rectangles ("chunks") of which
tensors lie where, and ``*.distcp`` files of chunks, each as ``torch.save`` writes it. Megatron-Core adds ``common.pt``
(objects that are not sharded) and ``metadata.json`` (the format's name).
"""

import io
import itertools
import json
import math
import os
import pickle
from collections import OrderedDict
from pathlib import Path
from typing import NamedTuple

import torch
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.strategies.common import COMMON_STATE_FNAME
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.utils import _create_file_view

from g2r_megatron.convert.tensor_table import Parameter
from g2r_megatron.errors import UserError, unwritable

METADATA = ".metadata"
FORMAT = "metadata.json"
FILE_BYTES = 4 * 10**9  # a .distcp file ends with the chunk that passes this
CACHE_BYTES = 2**29  # of chunks that neighbouring tensors share (q, k and v; gate and up)
# Everything that torch 2.2 to 2.13 and Megatron-Core put into .metadata. A pickle can call any function that it names.
ADMITTED = {
    "torch": {"Size", "float32", "bfloat16", "float16", "float64", "uint8", "int8", "int32", "int64", "bool"},
    "torch.serialization": {"_get_layout"},
    "torch.distributed.checkpoint.metadata": {
        "Metadata",
        "TensorStorageMetadata",
        "BytesStorageMetadata",
        "TensorProperties",
        "ChunkStorageMetadata",
        "MetadataIndex",
        "StorageMeta",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.distributed.checkpoint.planner": {
        "SavePlan",
        "WriteItem",
        "WriteItemType",
        "TensorWriteData",
        "BytesIOWriteData",
    },
    "megatron.core.dist_checkpointing.strategies.torch": {"MCoreMetadata", "MCoreSavePlan"},
    "collections": {"OrderedDict"},
    "pathlib": {"PosixPath", "PurePosixPath"},
}


class Stored(NamedTuple):
    """A chunk in a file: of tensor ``key``, at ``offsets``, of ``sizes``; ``length`` bytes from ``start`` of ``file``."""

    key: str
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: str
    start: int
    length: int


class ChunkWriter:
    """The .distcp files of one process. It keeps no data: a chunk is in its file when ``write`` returns."""

    def __init__(self, directory: Path, rank: int):
        self._directory, self._rank = directory, rank
        self._file: io.BufferedWriter | None = None
        self._files = 0
        self.stored: list[Stored] = []

    def write(self, key: str, offsets: tuple[int, ...], tensor: torch.Tensor) -> None:
        """``tensor`` (contiguous, owning its storage) goes to ``offsets``. ``UserError`` when the disk refuses it."""
        name = f"__{self._rank}_{self._files}.distcp"
        try:
            if self._file is None:
                self._file = (self._directory / name).open("xb")
            start = self._file.tell()
            _save(tensor, self._file)
            end = self._file.tell()
        except OSError as error:
            raise unwritable(self._directory / name, error) from error
        self.stored.append(Stored(key, offsets, tuple(tensor.shape), name, start, end - start))
        if end >= FILE_BYTES:
            self.close()

    def close(self) -> None:
        """Sync the open file to disk."""
        if self._file is None:
            return
        try:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
        except OSError as error:
            raise unwritable(Path(self._file.name), error) from error
        self._file = None
        self._files += 1


def _save(tensor: torch.Tensor, file: io.BufferedWriter) -> None:
    """``torch.save`` without check sums, which ``torch.load`` never looks at and which take longer than the disk.

    Raises ``OSError``: torch would replace it with its own error about the position in the file.
    """
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(tensor, file)
    except RuntimeError as error:
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise
    finally:
        torch.serialization.set_crc32_options(before)


def write_metadata(
    directory: Path, tensors: dict[str, tuple[torch.dtype, tuple[int, ...]]], stored: list[Stored]
) -> None:
    """``.metadata``, ``common.pt`` and ``metadata.json`` of a checkpoint whose chunks are all written."""
    chunks: dict[str, list[ChunkStorageMetadata]] = {key: [] for key in tensors}
    storage = {}
    for chunk in stored:
        offsets, sizes = torch.Size(chunk.offsets), torch.Size(chunk.sizes)
        index = MetadataIndex(chunk.key, offsets, len(chunks[chunk.key]))
        chunks[chunk.key].append(ChunkStorageMetadata(offsets, sizes))
        storage[index] = _StorageInfo(chunk.file, chunk.start, chunk.length)
    metadata = Metadata(
        {
            key: TensorStorageMetadata(TensorProperties(dtype=dtype), torch.Size(shape), chunks[key])
            for key, (dtype, shape) in tensors.items()
        },
        storage_data=storage,
        version="1.0.0",
    )
    try:
        with (directory / METADATA).open("wb") as file:
            pickle.dump(metadata, file)
        torch.save({}, directory / COMMON_STATE_FNAME)
        save_config(CheckpointingConfig("torch_dist", 1), str(directory))
    except (OSError, RuntimeError) as error:
        cause = error if isinstance(error, OSError) else error.__context__
        if not isinstance(cause, OSError):
            raise
        raise unwritable(directory, cause) from error


# ---- reading -------------------------------------------------------------------------------------------------------


class CheckpointReader:
    """The tensors of a torch_dist checkpoint: a ``ParameterSource``.

    Opening it checks that every chunk lies inside its file; no tensor is read.
    """

    def __init__(self, directory: Path):
        """Raises ``UserError`` for a checkpoint that is damaged, incomplete, of another format or no checkpoint."""
        self.directory = directory
        _check_format(directory)
        metadata = _read_metadata(directory / METADATA)
        self.tensors: dict[str, TensorStorageMetadata] = {
            key: value
            for key, value in metadata.state_dict_metadata.items()
            if isinstance(value, TensorStorageMetadata)
        }
        self._sizes: dict[str, int] = {}
        try:
            self._chunks = {key: self._chunks_of(key, metadata.storage_data) for key in self.tensors}
        except (AttributeError, TypeError) as error:
            raise self._damaged(f"{METADATA}: {_first_line(error)}") from error
        self._by_index: dict[str, dict[tuple[int, ...], list[Stored]]] = {}  # key -> place on the leading axes
        self._cache: OrderedDict[Stored, torch.Tensor] = OrderedDict()

    def _chunks_of(self, key: str, storage: dict) -> list[Stored]:
        chunks = []
        for chunk in self.tensors[key].chunks:
            info = storage.get(MetadataIndex(key, chunk.offsets))
            if info is None:
                raise self._damaged(f"{METADATA} does not say where a part of {key} is")
            self._check_place(info)
            chunks.append(
                Stored(key, tuple(chunk.offsets), tuple(chunk.sizes), info.relative_path, info.offset, info.length)
            )
        return chunks

    def _check_place(self, info: _StorageInfo) -> None:
        name = info.relative_path
        if name not in self._sizes:
            if Path(name).name != name or not (self.directory / name).is_file():
                raise self._damaged(f"{name} is missing")
            self._sizes[name] = (self.directory / name).stat().st_size
        if info.offset + info.length > self._sizes[name]:
            raise self._damaged(f"{name} is truncated: {self._sizes[name]} bytes")
        if info.transform_descriptors:
            raise self._damaged(f"{name} is compressed or encrypted ({info.transform_descriptors})")

    def check(self, parameters: list[Parameter]) -> None:
        """Raise ``UserError`` unless the checkpoint holds every parameter whole, in one dtype, and no other model's."""
        known = {parameter.key for parameter in parameters}
        for parameter in parameters:
            self._check_parameter(parameter)
        for key in self.tensors.keys() - known:
            if not _belongs_to_training(key):
                raise UserError(
                    f"checkpoint {self.directory}", f"unknown tensor {key}", "config.json must be of the same model"
                )

    def _check_parameter(self, parameter: Parameter) -> None:
        if parameter.key not in self.tensors:
            raise UserError(
                f"checkpoint {self.directory}",
                f"tensor {parameter.key} is missing",
                "config.json must be of the same model",
            )
        size, expected = tuple(self.tensors[parameter.key].size), parameter.stacked + parameter.shape
        axis = len(parameter.stacked)  # of the rows: a vocabulary may be padded
        padded = parameter.vocabulary and size[1:] == expected[1:] and size[0] > expected[0]
        if size != expected and not padded:
            raise UserError(
                f"checkpoint {self.directory} {parameter.key}", f"shape {size}", f"config.json asks for {expected}"
            )
        covered = sum(math.prod(c.sizes[axis:]) for c in self._chunks_at(parameter))
        if covered != math.prod(size[axis:]):
            raise self._damaged(f"parts of {parameter.name} are missing")

    def _chunks_at(self, parameter: Parameter) -> list[Stored]:
        """The chunks that hold a part of one parameter."""
        if parameter.key not in self._by_index:
            axes, places = len(parameter.index), {}
            for chunk in self._chunks[parameter.key]:
                ranges = [range(o, o + s) for o, s in zip(chunk.offsets[:axes], chunk.sizes[:axes], strict=True)]
                for index in itertools.product(*ranges):
                    places.setdefault(index, []).append(chunk)
            self._by_index[parameter.key] = places
        return self._by_index[parameter.key].get(parameter.index, [])

    def dtype(self, parameter: Parameter) -> torch.dtype:
        return self.tensors[parameter.key].properties.dtype

    def read(self, parameter: Parameter, start: int, stop: int) -> torch.Tensor:
        axes, out = len(parameter.index), None
        for chunk in self._chunks_at(parameter):
            offsets, sizes = chunk.offsets[axes:], chunk.sizes[axes:]
            low, high = max(start, offsets[0]), min(stop, offsets[0] + sizes[0])
            if low >= high:
                continue
            place = tuple(i - o for i, o in zip(parameter.index, chunk.offsets[:axes], strict=True))
            part = self._load(chunk)[place][low - offsets[0] : high - offsets[0]]
            if (high - low, *sizes[1:]) == (stop - start, *parameter.shape[1:]):
                return part
            if out is None:
                out = torch.empty((stop - start, *parameter.shape[1:]), dtype=part.dtype)
            target = out[low - start : high - start]
            if len(sizes) > 1:
                target = target[:, offsets[1] : offsets[1] + sizes[1]]
            target.copy_(part)
        return out

    def _load(self, chunk: Stored) -> torch.Tensor:
        """The chunk's tensor; the latest ones are kept, up to ``CACHE_BYTES``."""
        if chunk in self._cache:
            self._cache.move_to_end(chunk)
            return self._cache[chunk]
        coming = math.prod(chunk.sizes) * self.tensors[chunk.key].properties.dtype.itemsize
        while self._cache and coming + sum(t.nbytes for t in self._cache.values()) > CACHE_BYTES:
            self._cache.popitem(last=False)
        try:
            with (self.directory / chunk.file).open("rb") as file:
                tensor = torch.load(_create_file_view(file, chunk.start, chunk.length), "cpu", weights_only=True)  # type: ignore[arg-type]
        except (OSError, EOFError, RuntimeError, ValueError, pickle.UnpicklingError) as error:
            raise self._damaged(f"{chunk.file} at byte {chunk.start}: {_first_line(error)}") from error
        if (
            not isinstance(tensor, torch.Tensor)
            or tuple(tensor.shape) != chunk.sizes
            or tensor.dtype != self.tensors[chunk.key].properties.dtype
        ):
            raise self._damaged(f"{chunk.file} at byte {chunk.start} is not the part of {chunk.key} that it should be")
        self._cache[chunk] = tensor
        return tensor

    def _damaged(self, problem: str) -> UserError:
        return UserError(f"checkpoint {self.directory}", f"cannot be read ({problem})", "restore it from a copy")


def _belongs_to_training(key: str) -> bool:
    """Optimizer state is beside the weights in a training checkpoint."""
    return key.startswith(("optimizer.", "chained_"))


def _check_format(directory: Path) -> None:
    remedy = "must be a Megatron checkpoint of format torch_dist"
    if not (directory / METADATA).is_file():
        raise UserError(f"checkpoint {directory}", f"has no {METADATA}", remedy)
    try:
        backend = json.loads((directory / FORMAT).read_text())["sharded_backend"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"checkpoint {directory}", f"{FORMAT} cannot be read ({_first_line(error)})", remedy) from error
    if backend != "torch_dist":
        raise UserError(f"checkpoint {directory}", f"format {backend}", remedy)


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str):
        if name not in ADMITTED.get(module, ()):
            raise pickle.UnpicklingError(f"it names {module}.{name}, which no checkpoint needs")
        return super().find_class(module, name)


def _read_metadata(file: Path) -> Metadata:
    """The unpickled ``.metadata``; only the classes that checkpoints consist of are allowed in it."""
    try:
        with file.open("rb") as stream:
            metadata = _MetadataUnpickler(stream).load()
    except Exception as error:  # a damaged pickle raises nearly anything
        raise UserError(str(file), f"cannot be read ({_first_line(error)})", "restore it from a copy") from error
    if not isinstance(metadata, Metadata) or not isinstance(metadata.storage_data, dict):
        raise UserError(str(file), "does not describe a checkpoint", "restore it from a copy")
    return metadata


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), "") or type(error).__name__
