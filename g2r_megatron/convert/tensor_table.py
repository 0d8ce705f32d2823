"""The parameters of a whole model: their place in Megatron-Core's checkpoints and in Hugging Face files.

Megatron-Core itself says how its checkpoints name and stack parameters: a model without data (meta device) on one
rank's layout is asked for its sharded state. Nothing here depends on the layout that wrote a checkpoint.
"""

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from typing import Protocol

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories

from g2r_megatron.config.options import Layout, Precision
from g2r_megatron.model.build import build_empty_model
from g2r_megatron.model.hf import HFModel
from g2r_megatron.model.safetensors_files import SafetensorsReader
from g2r_megatron.model.torch_dist import sharded_weights
from g2r_megatron.model.weights import Piece, canonical_name, hf_shapes, parameter_pieces
from g2r_megatron.parallel.groups import ModelGroups, build_groups

BLOCK_BYTES = 16 * 2**20  # small enough that the C library reuses the memory; a block is at least one row


@dataclass(frozen=True)
class Parameter:
    """One parameter, unsharded. ``name`` is canonical; ``shape``: [rows, columns] or [rows], no padded vocabulary.

    It is element ``index`` of the leading axes (layer, expert), of sizes ``stacked``, of checkpoint tensor ``key``.
    ``vocabulary``: the checkpoint's tensor may have more rows, as many as some TP size asked for.
    """

    name: str
    shape: tuple[int, ...]
    key: str
    index: tuple[int, ...]
    stacked: tuple[int, ...]
    vocabulary: bool


class ParameterSource(Protocol):
    """Where a model's parameters can be read, rows at a time."""

    def dtype(self, parameter: Parameter) -> torch.dtype:
        """Of the stored values."""

    def read(self, parameter: Parameter, start: int, stop: int) -> torch.Tensor:
        """Rows ``start:stop``: [rows, columns] or [rows] on the CPU; may share memory with the source's own."""


def model_parameters(hf: HFModel) -> list[Parameter]:
    """Every parameter of the model once, in the model's order (collective: it makes process groups)."""
    groups = _groups()
    with torch.device("meta"):
        model = build_empty_model("convert", hf, groups, Precision(dtype="fp32"), spec="torch")
    state = sharded_weights(model.chunks, groups)["model"]
    apply_factories(state)  # a SwiGLU layer's gate and up rows are two shards
    found: dict[str, Parameter] = {}
    for name, value in state.items():
        canonical = canonical_name(name, 0, 0)
        found[canonical] = _parameter(canonical, next(iter(nested_values([value]))), hf)
    return list(found.values())


@cache
def _groups() -> ModelGroups:
    """Those of one model a process; made once, they cost threads and connections."""
    return build_groups("convert", Layout())


def _parameter(name: str, shard: ShardedTensor, hf: HFModel) -> Parameter:
    axes = shard.prepend_axis_num
    shape = tuple(shard.global_shape[axes:])
    vocabulary = shard.allow_shape_mismatch
    if vocabulary:
        shape = (hf.geometry.vocab, *shape[1:])
    index, stacked = tuple(shard.global_offset[:axes]), tuple(shard.global_shape[:axes])
    return Parameter(name, shape, shard.key, index, stacked, vocabulary)


class SafetensorsParameters:
    """Parameters put together from Hugging Face files: a ``ParameterSource``."""

    def __init__(self, hf: HFModel, reader: SafetensorsReader, parameters: list[Parameter]):
        self._hf, self._reader = hf, reader
        self._dtypes: dict[str, torch.dtype] = {}  # of a checkpoint's tensor: layers and experts are stacked in one
        for parameter in parameters:
            for piece in self._pieces(parameter, 0, parameter.shape[0]):
                known = self._dtypes.setdefault(parameter.key, reader.dtype(piece.hf))
                self._dtypes[parameter.key] = torch.promote_types(known, reader.dtype(piece.hf))

    def dtype(self, parameter: Parameter) -> torch.dtype:
        """That of its tensors; of several dtypes, one that can hold all their values."""
        return self._dtypes[parameter.key]

    def position(self, parameter: Parameter) -> tuple[str, int]:
        """(file, offset) of its first value: reading in this order reads the files from beginning to end."""
        info = self._reader.tensors[self._pieces(parameter, 0, 1)[0].hf]
        return str(info.file), info.offset

    def read(self, parameter: Parameter, start: int, stop: int) -> torch.Tensor:
        out = torch.empty((stop - start, *parameter.shape[1:]), dtype=self.dtype(parameter))
        row = 0
        for piece in self._pieces(parameter, start, stop):
            rows = piece.rows[1] - piece.rows[0]
            if self._reader.dtype(piece.hf) == out.dtype:
                self._reader.read_into(piece.hf, piece.rows, out[row : row + rows])
            else:
                out[row : row + rows] = self._reader.read(piece.hf, piece.rows)
            row += rows
        return out

    def _pieces(self, parameter: Parameter, start: int, stop: int) -> list[Piece]:
        return parameter_pieces(self._hf, parameter.name, start, stop)


class NamedTensors:
    """The Hugging Face tensors of a model whose parameters are in a ``ParameterSource``."""

    def __init__(self, hf: HFModel, parameters: list[Parameter], source: ParameterSource):
        self._source = source
        self.shapes = hf_shapes(hf)
        # HF name -> [(rows of the HF tensor's 2-D view, the parameter they are in, its row that is the first of them)]
        self._parts: dict[str, list[tuple[tuple[int, int], Parameter, int]]] = {name: [] for name in self.shapes}
        for parameter in parameters:
            row = 0
            for piece in parameter_pieces(hf, parameter.name, 0, parameter.shape[0]):
                self._parts[piece.hf].append((piece.rows, parameter, row))
                row += piece.rows[1] - piece.rows[0]
        for parts in self._parts.values():
            parts.sort(key=lambda part: part[0])

    @property
    def names(self) -> set[str]:
        return set(self.shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        return self.shapes[name]

    def dtype(self, name: str) -> torch.dtype:
        return self._source.dtype(self._parts[name][0][1])

    def read(self, name: str, rows: tuple[int, int]) -> torch.Tensor:
        """``rows`` of the 2-D view, [rows, columns] or [rows]; may share memory with the source's own."""
        pieces = []
        for (first, last), parameter, row in self._parts[name]:
            low, high = max(rows[0], first), min(rows[1], last)
            if low < high:
                pieces.append(self._source.read(parameter, row + low - first, row + high - first))
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


@dataclass(frozen=True)
class Block:
    """Rows ``start:stop`` of the 2-D view of item number ``item`` of a list of tensors."""

    item: int
    start: int
    stop: int
    nbytes: int


def row_blocks(shapes: list[tuple[tuple[int, ...], torch.dtype]]) -> list[Block]:
    """All rows of all tensors, in order, in blocks of about ``BLOCK_BYTES``."""
    blocks = []
    for item, (shape, dtype) in enumerate(shapes):
        columns = shape[-1] if len(shape) > 1 else 1
        rows = math.prod(shape) // columns
        step = max(1, BLOCK_BYTES // (columns * dtype.itemsize))
        for start in range(0, rows, step):
            stop = min(start + step, rows)
            blocks.append(Block(item, start, stop, (stop - start) * columns * dtype.itemsize))
    return blocks


def share(blocks: list[Block], rank: int, processes: int) -> Iterator[Block]:
    """The blocks of one process: a run of neighbours, of about as many bytes as every other process's."""
    total, before = sum(block.nbytes for block in blocks), 0
    for block in blocks:
        if (before + block.nbytes / 2) * processes // max(total, 1) == rank:
            yield block
        before += block.nbytes


def read_ahead(blocks: Iterable[Block], read: Callable[[Block], torch.Tensor]) -> Iterator[tuple[Block, torch.Tensor]]:
    """(block, read(block)) in turn; a thread reads the next block while the caller writes this one."""
    waiting: deque[tuple[Block, Future]] = deque()
    with ThreadPoolExecutor(max_workers=1) as thread:
        for block in blocks:
            waiting.append((block, thread.submit(read, block)))
            if len(waiting) > 1:
                first, future = waiting.popleft()
                yield first, future.result()
        for last, future in waiting:
            yield last, future.result()
