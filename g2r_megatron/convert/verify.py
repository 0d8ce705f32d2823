"""Two checkpoints of either kind compared: every tensor bit for bit under its Hugging Face name, and the configs."""

import dataclasses
import hashlib
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
import torch.distributed as dist

from g2r_megatron.convert.byte_progress import CopyProgress, format_bytes
from g2r_megatron.convert.chunks import METADATA, CheckpointReader
from g2r_megatron.convert.tensor_table import (
    NamedTensors,
    Parameter,
    SafetensorsParameters,
    model_parameters,
    row_blocks,
    share,
)
from g2r_megatron.convert.to_hf import open_checkpoint
from g2r_megatron.model.families import EMBEDDING, HEAD
from g2r_megatron.model.hf import HFModel, open_hf_model, read_json
from g2r_megatron.model.safetensors_files import SafetensorsReader
from g2r_megatron.model.weights import check_tensors
from g2r_megatron.parallel.agreement import raised_by_all
from g2r_megatron.parallel.groups import initialize

# config.json fields whose difference is only worth a note: they do not change what the model is
NOTED_FIELDS = {"transformers_version", "_name_or_path", "architectures", "use_cache"}
INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes of the element


class Tensors(Protocol):
    """Named tensors that can be read rows at a time."""

    @property
    def names(self) -> set[str]: ...

    def shape(self, name: str) -> tuple[int, ...]: ...

    def dtype(self, name: str) -> torch.dtype: ...

    def read(self, name: str, rows: tuple[int, int]) -> torch.Tensor: ...


@dataclass
class Side:
    """One of the two checkpoints."""

    path: str
    hf: HFModel
    tensors: Tensors

    def __str__(self) -> str:
        kind = "Hugging Face" if self.hf.checkpoint is None else "Megatron"
        sizes = [math.prod(self.tensors.shape(n)) * self.tensors.dtype(n).itemsize for n in self.tensors.names]
        return f"{self.path} ({kind}, {len(sizes)} tensors, {format_bytes(sum(sizes))})"


@dataclass(frozen=True)
class TensorReport:
    """One tensor: ``digest_*``: sha256 of its bytes; ``problem``: how the sides differ, None if not at all."""

    name: str
    digest_a: str
    digest_b: str
    problem: str | None


class UnfusedTensors:
    """A Hugging Face directory with fused experts under the names of separate ones; its other tensors are kept."""

    def __init__(self, hf: HFModel, parameters: list[Parameter], reader: SafetensorsReader):
        separate = dataclasses.replace(hf, fused_experts=False)
        self._named = NamedTensors(separate, parameters, SafetensorsParameters(hf, reader, parameters))
        self._reader = reader
        own = NamedTensors(hf, parameters, SafetensorsParameters(hf, reader, parameters)).names
        self.names = self._named.names | (reader.names - own)

    def _of(self, name: str) -> Tensors:
        return self._named if name in self._named.names else self._reader

    def shape(self, name: str) -> tuple[int, ...]:
        return self._of(name).shape(name)

    def dtype(self, name: str) -> torch.dtype:
        return self._of(name).dtype(name)

    def read(self, name: str, rows: tuple[int, int]) -> torch.Tensor:
        return self._of(name).read(name, rows)


def open_sides(paths: tuple[str, str]) -> tuple[Side, Side]:
    """Both checkpoints (collective). Raises ``UserError`` on every process for one that is damaged."""
    initialize(seed=0)
    models = []
    with raised_by_all():
        for path, name in zip(paths, "AB", strict=True):
            if (Path(path) / METADATA).is_file():
                models.append(open_checkpoint(Path(path)))
            else:
                models.append(open_hf_model(path, name))
    separate = len({hf.fused_experts for hf in models}) > 1
    a, b = (Side(path, hf, _open_tensors(hf, separate)) for path, hf in zip(paths, models, strict=True))
    return a, b


def _open_tensors(hf: HFModel, separate: bool) -> Tensors:
    """``separate``: experts one by one, however they are stored."""
    with raised_by_all():
        reader = SafetensorsReader(hf.path) if hf.checkpoint is None else CheckpointReader(hf.checkpoint)
    if isinstance(reader, SafetensorsReader) and not (separate and hf.fused_experts):
        return reader
    parameters = model_parameters(hf)
    with raised_by_all():
        if isinstance(reader, SafetensorsReader):
            check_tensors(hf, reader)
        else:
            reader.check(parameters)
    if isinstance(reader, SafetensorsReader):
        return UnfusedTensors(hf, parameters, reader)
    return NamedTensors(dataclasses.replace(hf, fused_experts=hf.fused_experts and not separate), parameters, reader)


# ---- tensors --------------------------------------------------------------------------------------------------------


def compare_tensors(a: Side, b: Side) -> list[TensorReport]:
    """A report of every tensor of either side, by name (collective; the same on every process)."""
    names = sorted(a.tensors.names | b.tensors.names)
    pairs = [(name, _counterpart(name, a), _counterpart(name, b)) for name in names]
    shapes = []
    for name, at_a, at_b in pairs:
        side, found = (a, at_a) if at_a else (b, at_b)
        shapes.append((side.tensors.shape(found or name), side.tensors.dtype(found or name)))
    blocks = row_blocks(shapes)
    sizes = [0] * len(pairs)
    for block in blocks:
        sizes[block.item] += block.nbytes
    # whole tensors are shared out: the hash of one is of its bytes in order
    whole = [dataclasses.replace(block, nbytes=sizes[block.item]) for block in blocks if block.start == 0]
    rank, processes = dist.get_rank(), dist.get_world_size()
    mine = list(share(whole, rank, processes))
    reports: list[TensorReport] = []
    part = sum(block.nbytes for block in mine)
    with (
        raised_by_all(),
        CopyProgress("compare", len(pairs), sum(sizes), part, enabled=rank == 0) as progress,
    ):
        for block in mine:
            reports.append(_compare(*pairs[block.item], a, b))
            progress.add(block.nbytes)
    gathered: list[list[TensorReport]] = [[] for _ in range(processes)]
    dist.all_gather_object(gathered, reports)
    return sorted((report for found in gathered for report in found), key=lambda report: report.name)


def _counterpart(name: str, side: Side) -> str | None:
    """The tensor of ``side`` that is to equal ``name``; a tied output layer that is not repeated is the embedding."""
    if name in side.tensors.names:
        return name
    return EMBEDDING if name == HEAD and side.hf.geometry.tied and EMBEDDING in side.tensors.names else None


def _compare(name: str, at_a: str | None, at_b: str | None, a: Side, b: Side) -> TensorReport:
    if at_a is None or at_b is None:
        side, found, place = (a, at_a, "A") if at_a else (b, at_b, "B")
        digest = _digest(side.tensors, found)
        return TensorReport(name, digest if at_a else "", digest if at_b else "", f"only in {place}")
    shapes = a.tensors.shape(at_a), b.tensors.shape(at_b)
    dtypes = a.tensors.dtype(at_a), b.tensors.dtype(at_b)
    if shapes[0] != shapes[1]:
        problem = f"shape {list(shapes[0])} in A, {list(shapes[1])} in B"
        return TensorReport(name, _digest(a.tensors, at_a), _digest(b.tensors, at_b), problem)
    differences = _Differences(shapes[0])
    hashes = hashlib.sha256(), hashlib.sha256()
    for rows in _row_ranges(shapes[0], max(dtypes, key=lambda dtype: dtype.itemsize)):
        blocks = a.tensors.read(at_a, rows), b.tensors.read(at_b, rows)
        for sha, block in zip(hashes, blocks, strict=True):
            sha.update(_bytes_of(block))
        differences.add(rows[0], *blocks)
    problem = None
    if dtypes[0] != dtypes[1]:
        values = differences.text() if differences.count else "the values are equal"
        problem = f"dtype {_name(dtypes[0])} in A, {_name(dtypes[1])} in B; {values}"
    elif differences.count:
        problem = differences.text()
    return TensorReport(name, hashes[0].hexdigest(), hashes[1].hexdigest(), problem)


class _Differences:
    """How many elements differ, and where most."""

    def __init__(self, shape: tuple[int, ...]):
        self._elements, self._vector = math.prod(shape), len(shape) < 2
        self.count, self._largest, self._place, self._values = 0, -1.0, (0, 0), (0.0, 0.0)

    def add(self, first_row: int, a: torch.Tensor, b: torch.Tensor) -> None:
        """Two blocks of rows from ``first_row`` on. Of one dtype they differ where their bits do, else where values do."""
        if a.dtype == b.dtype:
            bits = INTEGERS[a.dtype.itemsize]
            different = a.contiguous().view(bits) != b.contiguous().view(bits)
        else:
            different = a.float() != b.float()
        if not different.any():
            return
        a, b, different = (t.reshape(t.shape[0], -1) for t in (a.float(), b.float(), different))
        self.count += int(different.sum())
        size = torch.where(different, (a - b).abs(), -1.0).nan_to_num(math.inf, math.inf)
        place = int(size.argmax())
        row, column = divmod(place, a.shape[1])
        if size[row, column] > self._largest:
            self._largest, self._place = float(size[row, column]), (first_row + row, column)
            self._values = float(a[row, column]), float(b[row, column])

    def text(self) -> str:
        row, column = self._place
        place = f"element {row}" if self._vector else f"row {row}, column {column}"
        return (
            f"{self.count} of {self._elements} values differ, most at {place}: {self._values[0]:.9g} in A, "
            f"{self._values[1]:.9g} in B (difference {self._largest:.3g})"
        )


def _row_ranges(shape: tuple[int, ...], dtype: torch.dtype) -> Iterator[tuple[int, int]]:
    for block in row_blocks([(shape, dtype)]):
        yield block.start, block.stop


def _digest(tensors: Tensors, name: str) -> str:
    digest = hashlib.sha256()
    for rows in _row_ranges(tensors.shape(name), tensors.dtype(name)):
        digest.update(_bytes_of(tensors.read(name, rows)))
    return digest.hexdigest()


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().data


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# ---- configs --------------------------------------------------------------------------------------------------------


def compare_configs(a: Side, b: Side) -> tuple[list[str], list[str]]:
    """(differences, notes): fields of config.json that differ, one line each; the latter do not make models differ."""
    left, right = (_config_fields(side.hf.path / "config.json") for side in (a, b))
    differences, notes = [], []
    for field in sorted(left.keys() | right.keys()):
        values = left.get(field, "absent"), right.get(field, "absent")
        if values[0] != values[1]:
            line = f"config.json {field}: {json.dumps(values[0])} in A, {json.dumps(values[1])} in B"
            (notes if field in NOTED_FIELDS else differences).append(line)
    return differences, notes


def _config_fields(file: Path) -> dict:
    """The fields, with the older spelling ``torch_dtype`` of ``dtype`` taken for the same."""
    fields = read_json(file)
    if "torch_dtype" in fields:
        fields["dtype"] = fields.pop("torch_dtype")
    return fields
