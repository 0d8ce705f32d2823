"""Directories of safetensors files: every header checked before data is read; rows read and written in place.

All access is by pread and pwrite. Mapped pages would count as this process's memory, and a conversion must need little
memory compared with the files that it converts.
"""

import errno
import json
import os
import weakref
from collections.abc import Iterable
from pathlib import Path

import torch

from g2r_megatron.errors import UserError
from g2r_megatron.model.safetensors_format import (
    DTYPES,
    INDEX,
    SINGLE,
    TensorInfo,
    make_header,
    model_files,
    open_regular,
    placed_tensors,
    pread,
    read_header,
    split_into_files,
)

__all__ = ["DTYPES", "SafetensorsReader", "SafetensorsWriter", "Spans", "TensorInfo"]

BLOCK_BYTES = 4 * 2**20  # whole rows read at a time to cut columns out of them: from a cold disk 3x a read per row

Spans = dict[str, list[tuple[int, int]]]  # tensor -> [first row, row after the last) of each write


class SafetensorsReader:
    """The tensors of a Hugging Face directory's safetensors files. Its methods may be called from several threads."""

    def __init__(self, directory: Path):
        """Reads and checks the index and all headers. Raises ``UserError`` naming the file and tensor at fault."""
        self._fds: dict[Path, int] = {}
        weakref.finalize(self, _close, self._fds)
        files = model_files(directory)
        found: dict[Path, dict[str, TensorInfo]] = {}
        for file in files:
            self._fds[file] = open_regular(file)
            found[file] = read_header(self._fds[file], file)
        self.tensors: dict[str, TensorInfo] = placed_tensors(found, files)

    @property
    def names(self) -> set[str]:
        return set(self.tensors)

    def keep(self, names: dict[str, str]) -> None:
        """From here on hold only these tensors, ``names``: new name -> the name in the file."""
        self.tensors = {new: self.tensors[old] for new, old in names.items()}

    @property
    def total_bytes(self) -> int:
        """Bytes of all tensors, without headers."""
        return sum(info.nbytes for info in self.tensors.values())

    def place(self, name: str) -> tuple[str, int]:
        """(file, offset) of a tensor."""
        return str(self.tensors[name].file), self.tensors[name].offset

    def shape(self, name: str) -> tuple[int, ...]:
        return self.tensors[name].shape

    def dtype(self, name: str) -> torch.dtype:
        return self.tensors[name].dtype

    def read(
        self, name: str, rows: tuple[int, int] | None = None, columns: tuple[int, int] | None = None
    ) -> torch.Tensor:
        """A rectangle of the 2-D view (last dimension = columns, all others flattened into rows), in the file's dtype.

        Returns [rows, columns] on the CPU; [rows] for a 1-D tensor or a scalar, which have no columns; the tensor's own
        shape when neither is given. Takes at most max(4 MB, one row's columns) of memory beyond the result.
        Raises ``UserError`` when the file cannot be read, ``ValueError`` for a range outside the tensor.
        """
        info = self.tensors[name]
        if rows is None and columns is None:
            out = torch.empty(info.shape, dtype=info.dtype)
            self.read_into(name, (0, info.rows), out)
            return out
        start, stop = _checked_range(name, "rows", rows, info.rows)
        if len(info.shape) < 2:
            if columns is not None:
                raise ValueError(f"{name} {list(info.shape)} has no columns")
            out = torch.empty(stop - start, dtype=info.dtype)
            self.read_into(name, (start, stop), out)
            return out
        left, right = _checked_range(name, "columns", columns, info.columns)
        out = torch.empty(stop - start, right - left, dtype=info.dtype)
        if right - left == info.columns:
            self.read_into(name, (start, stop), out)
        elif info.row_bytes > BLOCK_BYTES:
            for row in range(start, stop):
                offset = info.offset + row * info.row_bytes + left * info.dtype.itemsize
                pread(self._fds[info.file], info.file, offset, _bytes_of(out[row - start]))
        else:
            self._cut_columns(name, (start, stop), (left, right), out)
        return out

    def _cut_columns(self, name: str, rows: tuple[int, int], columns: tuple[int, int], out: torch.Tensor) -> None:
        """Reads whole rows a block at a time and keeps ``columns`` of them: ``out`` [rows, columns]."""
        info = self.tensors[name]
        step = BLOCK_BYTES // info.row_bytes
        block = torch.empty(min(step, rows[1] - rows[0]), info.columns, dtype=info.dtype)
        for first in range(*rows, step):
            last = min(first + step, rows[1])
            self.read_into(name, (first, last), block[: last - first])
            out[first - rows[0] : last - rows[0]] = block[: last - first, columns[0] : columns[1]]

    def read_into(self, name: str, rows: tuple[int, int], out: torch.Tensor) -> None:
        """Rows of the 2-D view straight into ``out``: contiguous, on the CPU, the file's dtype, as many elements.

        Raises ``UserError`` when the file cannot be read, ``ValueError`` for a range or ``out`` that does not fit.
        """
        info = self.tensors[name]
        start, stop = _checked_range(name, "rows", rows, info.rows)
        _check_tensor(name, out, info.dtype, (stop - start) * info.columns)
        pread(self._fds[info.file], info.file, info.offset + start * info.row_bytes, _bytes_of(out))


class SafetensorsWriter:
    """A directory of safetensors files of one model, written row by row in any order and by several processes.

    One process creates the files; the others attach after that. Each writes its rows; at the end the others ``sync()``
    and send their ``written`` to one process, which calls ``finish(those)``.
    """

    def __init__(
        self,
        directory: Path,
        tensors: dict[str, tuple[torch.dtype, tuple[int, ...]]],
        max_shard_bytes: int = 5 * 10**9,
        create: bool = True,
    ):
        """``tensors``: name -> (dtype, shape), in the order of the files; the split depends on nothing else.

        ``create``: allocate all files (new ones, in an existing directory) at full size and write their headers; raises
        ``UserError`` when the disk has no room for them or the directory cannot be written. Otherwise attach to the
        files that another process has created from the same arguments; raises ``RuntimeError`` when they differ.
        """
        self.directory = directory
        self.tensors: dict[str, TensorInfo] = {}
        self.written: Spans = {name: [] for name in tensors}
        self._fds: dict[Path, int] = {}
        weakref.finalize(self, _close, self._fds)
        headers = {}
        for file, names in split_into_files(directory, tensors, max_shard_bytes).items():
            headers[file], infos = make_header(file, {name: tensors[name] for name in names})
            self.tensors |= infos
        if create:
            self._create(headers)
        else:
            self._attach(headers)

    @property
    def total_bytes(self) -> int:
        """Bytes of all tensors, without headers."""
        return sum(info.nbytes for info in self.tensors.values())

    def _sizes(self, headers: dict[Path, bytes]) -> dict[Path, int]:
        """File -> its full size, bytes."""
        sizes = {file: len(header) for file, header in headers.items()}
        for info in self.tensors.values():
            sizes[info.file] += info.nbytes
        return sizes

    def _create(self, headers: dict[Path, bytes]) -> None:
        sizes = self._sizes(headers)
        try:
            for file, header in headers.items():
                self._fds[file] = _create_file(file)
                _allocate(self._fds[file], file, sizes[file], sum(sizes.values()))
                _pwrite(self._fds[file], file, 0, memoryview(header))
        except UserError:
            for file in self._fds:
                file.unlink()
            _close(self._fds)  # gives the space back
            raise

    def _attach(self, headers: dict[Path, bytes]) -> None:
        sizes = self._sizes(headers)
        for file, header in headers.items():
            self._fds[file] = os.open(file, os.O_RDWR)
            if os.fstat(self._fds[file]).st_size != sizes[file] or os.pread(self._fds[file], len(header), 0) != header:
                raise RuntimeError(f"{file} was created for other tensors than {list(self.tensors)[:3]}...")

    def write(self, name: str, tensor: torch.Tensor, first_row: int = 0) -> None:
        """Rows of the 2-D view, from ``first_row`` on. No row may be written twice: ``finish`` refuses that.

        ``tensor``: CPU, contiguous, the declared dtype, of any shape that holds whole rows ([rows, columns], or the
        tensor's own shape). Raises ``ValueError`` for any other tensor, ``UserError`` when the disk refuses it.
        """
        if name not in self.tensors:
            raise ValueError(f"{name} is not one of this writer's {len(self.tensors)} tensors")
        info = self.tensors[name]
        fits = tensor.shape[-1:] == info.shape[-1:] if len(info.shape) > 1 else tensor.dim() < 2
        if not fits:
            raise ValueError(f"{name} {list(info.shape)}: {list(tensor.shape)} is not made of its rows")
        rows = tensor.numel() // info.columns if info.columns else 0
        _check_tensor(name, tensor, info.dtype, rows * info.columns)
        start, stop = _checked_range(name, "rows", (first_row, first_row + rows), info.rows)
        _pwrite(self._fds[info.file], info.file, info.offset + start * info.row_bytes, _bytes_of(tensor))
        if stop > start:
            self.written[name].append((start, stop))

    def sync(self) -> None:
        """Forces what this process wrote to the disk. Raises ``UserError`` when the disk refuses it."""
        for file, fd in self._fds.items():
            try:
                os.fsync(fd)
            except OSError as error:
                raise UserError(str(file), f"cannot be written ({error.strerror})", "check the disk") from error

    def finish(self, others: Iterable[Spans] = ()) -> None:
        """Completes the directory, in one process: checks what it and ``others`` have ``written``, syncs, writes the index.

        Raises ``RuntimeError`` naming the first tensor with rows that nobody wrote, or that were written twice.
        """
        others = list(others)
        for name, info in self.tensors.items():
            spans = [span for written in (self.written, *others) for span in written[name]]
            _check_spans(name, spans, info)
        self.sync()
        if any(info.file.name != SINGLE for info in self.tensors.values()):
            weight_map = {name: info.file.name for name, info in self.tensors.items()}
            index = {"metadata": {"total_size": self.total_bytes}, "weight_map": weight_map}
            _write_new(self.directory / INDEX, (json.dumps(index, indent=2) + "\n").encode())
        _sync_directory(self.directory)


# ---- bytes ----------------------------------------------------------------------------------------------------------


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor."""
    return tensor.detach().reshape(-1).view(torch.uint8).numpy().data


def _pwrite(fd: int, file: Path, offset: int, data: memoryview) -> None:
    done = 0
    while done < len(data):
        try:
            done += os.pwrite(fd, data[done:], offset + done)
        except OSError as error:
            left = len(data) - done
            raise UserError(
                str(file), f"{left} bytes cannot be written ({error.strerror})", "free disk space and start again"
            ) from error


def _create_file(file: Path) -> int:
    try:
        return os.open(file, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
    except OSError as error:
        remedy = "give a new directory that can be written"
        raise UserError(str(file), f"cannot be created ({error.strerror})", remedy) from error


def _allocate(fd: int, file: Path, size: int, total: int) -> None:
    """Reserves the space now, so that a full disk is found before any work. ``total``: of all files, for the message."""
    try:
        os.posix_fallocate(fd, 0, size)
    except OSError as error:
        if error.errno in (
            errno.EOPNOTSUPP,
            errno.EINVAL,
        ):  # not supported here: a full disk is found when we write
            os.ftruncate(fd, size)
            return
        found = f"needs {size} bytes, all files {total} bytes ({error.strerror})"
        raise UserError(str(file), found, "free disk space or choose another disk") from error


def _close(fds: dict[Path, int]) -> None:
    while fds:
        os.close(fds.popitem()[1])


def _write_new(file: Path, data: bytes) -> None:
    try:
        with file.open("xb") as out:
            out.write(data)
            out.flush()
            os.fsync(out.fileno())
    except OSError as error:
        raise UserError(
            str(file), f"cannot be written ({error.strerror})", "free disk space and start again"
        ) from error


def _sync_directory(directory: Path) -> None:
    fd = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


# ---- arguments ------------------------------------------------------------------------------------------------------


def _checked_range(name: str, what: str, given: tuple[int, int] | None, length: int) -> tuple[int, int]:
    """``given``, or all of 0..``length``. Raises ``ValueError`` for a range outside it."""
    start, stop = (0, length) if given is None else given
    if not 0 <= start <= stop <= length:
        raise ValueError(f"{name}: {what} {start}:{stop} of {length}")
    return start, stop


def _check_tensor(name: str, tensor: torch.Tensor, dtype: torch.dtype, numel: int) -> None:
    """Raises ``ValueError`` unless ``tensor`` is CPU memory of exactly ``numel`` elements of ``dtype``."""
    if tensor.dtype != dtype or tensor.numel() != numel or tensor.device.type != "cpu" or not tensor.is_contiguous():
        given = f"{tensor.dtype} {list(tensor.shape)} on {tensor.device}, contiguous: {tensor.is_contiguous()}"
        raise ValueError(f"{name}: {given}; must be {numel} contiguous elements of {dtype} on the CPU")


def _check_spans(name: str, spans: list[tuple[int, int]], info: TensorInfo) -> None:
    """Raises ``RuntimeError`` unless ``spans`` cover each row of the tensor once."""
    end = 0
    for start, stop in [*sorted(spans), (info.rows, info.rows)]:
        if start < end:
            raise RuntimeError(f"{info.file} {name}: rows {start}:{min(end, stop)} of {info.rows} were written twice")
        if start > end and info.columns:
            raise RuntimeError(f"{info.file} {name}: rows {end}:{start} of {info.rows} were not written")
        end = stop
