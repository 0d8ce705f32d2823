"""The file that ``g2r judge`` writes: whole or absent, continued after a crash, and made by one job or several.

While it is written it is ``.NAME.partial``, whose first line identifies the job. Whole batches that a killed process
wrote are kept. So a continued file equals the file of an uninterrupted process, bit for bit. Several jobs each write a
share of the rows: ``OUTPUT.parts/00003-of-00016.jsonl``; the last one to finish joins them. Partial files and parts are
lines of JSON in every format; what is whole is written by a ``Writer``.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import BinaryIO

from g2r_megatron.config.command_options import EvalConfig, OfflineJudgeConfig, ProbeConfig
from g2r_megatron.data.types import Query
from g2r_megatron.errors import UserError

# Options that may differ between two attempts at one file: they change no number by more than rounding.
FREE = ("input", "queries", "output", "batch_rows")  # the rows count, not their paths
Writer = Callable[[Iterable[bytes], BinaryIO], None]


def write_lines(lines: Iterable[bytes], target: BinaryIO) -> None:
    target.writelines(lines)


def share_of(count: int, shard: int, shards: int) -> range:
    """The rows of one of ``shards`` shares of ``count`` rows: consecutive, sizes equal but for one row."""
    return range(shard * count // shards, (shard + 1) * count // shards)


def part_path(output: Path, shard: int, shards: int) -> Path:
    """Where a share is written: ``output`` itself if there is only one."""
    return output if shards == 1 else parts_directory(output) / f"{shard:05d}-of-{shards:05d}.jsonl"


def parts_directory(output: Path) -> Path:
    return output.with_name(output.name + ".parts")


def job_key(
    config: OfflineJudgeConfig | ProbeConfig | EvalConfig, queries: Sequence[Query], free: Collection[str] = FREE
) -> str:
    """A digest of everything that decides what the file holds: the options, but for ``free``, and the rows themselves."""
    options = {name: value for name, value in asdict(config).items() if name not in free}
    described = json.dumps([options, [asdict(query) for query in queries]], sort_keys=True)
    return hashlib.sha256(described.encode()).hexdigest()


@dataclass
class PartialFile:
    """A file that will become ``path``; ``rewards`` are those of the rows it holds so far."""

    path: Path
    file: BinaryIO
    rewards: list[float]

    def write(self, records: Sequence[dict]) -> None:
        """Append a batch. It is on the disk when this returns. Raises ``UserError`` if that fails."""
        lines = "".join(json.dumps(record, allow_nan=False) + "\n" for record in records)
        with _named_errors(self.path):
            self.file.write(lines.encode())
            _to_disk(self.file)
        self.rewards += [record["reward"] for record in records]

    def complete(self, write: Writer = write_lines) -> None:
        """Make the whole file of the lines, without the first one. Raises ``UserError`` if another process has taken over."""
        partial, whole = partial_path(self.path), self.path.with_name(f".{self.path.name}.{_process()}.whole")
        with _named_errors(self.path):
            if not partial.exists() or os.fstat(self.file.fileno()).st_ino != partial.stat().st_ino:
                raise UserError("output", f"{self.path} is being written by another process", "leave it to that one")
            with partial.open("rb") as source, whole.open("wb") as target:
                source.readline()
                write(source, target)
                _to_disk(target)
            whole.replace(self.path)
            partial.unlink()


def partial_path(path: Path) -> Path:
    return path.with_name(f".{path.name}.partial")


@contextmanager
def partial_file(path: Path, key: str, ids: Sequence[str | int | float], batch: int) -> Iterator[PartialFile]:
    """Continue ``path``'s partial file, or begin it. ``ids``: of the rows it will hold, in order.

    Whole batches of ``batch`` rows are kept. They are copied into a new file that takes the old one's name: a process
    that still has the old file open (on a node that Slurm no longer uses) cannot write into the new one. Raises
    ``UserError`` if the partial file belongs to another job, or cannot be written.
    """
    partial, fresh = partial_path(path), path.with_name(f".{path.name}.{_process()}.new")
    with _named_errors(path):
        path.parent.mkdir(exist_ok=True)
        with fresh.open("wb") as target:
            target.write(json.dumps({"job": key}).encode() + b"\n")
            rewards = copy_whole_batches(partial, target, key, ids, batch) if partial.exists() else []
            _to_disk(target)
        fresh.replace(partial)
        file = partial.open("ab")
    result = PartialFile(path, file, rewards)
    try:
        with file:
            yield result
    finally:
        if not result.rewards:  # a mistake found before the first row: nothing to go on from
            partial.unlink(missing_ok=True)


def copy_whole_batches(
    partial: Path, target: BinaryIO, key: str, ids: Sequence[str | int | float], batch: int
) -> list[float]:
    """Copy the lines of ``partial`` that are complete, without the first line; returns the rewards of their rows.

    The copy ends at a line that a crash cut short, or at a line of another row.
    """
    rewards: list[float] = []
    with partial.open("rb") as file:
        if _record(file.readline()).get("job") != key:
            Path(target.name).unlink()
            remedy = "repeat that command, or remove the file to begin anew"
            raise UserError("output", f"{partial} was begun with other options or rows", remedy)
        while len(rewards) < len(ids):
            wanted = ids[len(rewards) : len(rewards) + batch]
            lines = [file.readline() for _ in wanted]
            records = [_record(line) for line in lines]
            if [record.get("id") for record in records] != list(wanted):
                break
            target.writelines(lines)
            rewards += [record["reward"] for record in records]
    return rewards


def join_parts(output: Path, shards: int, write: Writer = write_lines) -> bool:
    """Write ``output`` from its parts if all exist, then remove them; returns whether ``output`` exists now.

    Any number of jobs may do this at once: each writes the same bytes to a file with its own name and renames that
    file.
    """
    parts = [part_path(output, shard, shards) for shard in range(shards)]
    if not output.exists() and not all(part.exists() for part in parts):
        return False
    whole = output.with_name(f".{output.name}.{_process()}.whole")
    with _named_errors(output):
        try:
            if not output.exists():
                with whole.open("wb") as target:
                    write(_lines(parts), target)
                    _to_disk(target)
                whole.replace(output)
        except FileNotFoundError:  # another job has joined and removed them meanwhile
            whole.unlink(missing_ok=True)
        shutil.rmtree(parts_directory(output), ignore_errors=True)
    return True


def _lines(parts: Iterable[Path]) -> Iterator[bytes]:
    for part in parts:
        with part.open("rb") as source:
            yield from source


def check_parts(output: Path, shards: int) -> None:
    """Raise ``UserError`` if ``output`` was begun with another number of shares."""
    found = [file.name.lstrip(".") for file in parts_directory(output).glob("*-of-*")]
    others = sorted({name.partition("-of-")[2][:5] for name in found} - {f"{shards:05d}"})
    if others:
        directory = parts_directory(output)
        remedy = "give the same number again, or remove the directory to begin anew"
        raise UserError("shards", f"{shards}, but {directory} holds parts of {int(others[0])}", remedy)


def _process() -> str:
    """A name that no other process on the file system has."""
    return f"{os.uname().nodename}.{os.getpid()}"


def _record(line: bytes) -> dict:
    """The object of a line; empty if the line is not whole or not an object."""
    try:
        record = json.loads(line) if line.endswith(b"\n") else None
    except ValueError:  # cut short, or blocks were not written to the disk
        return {}
    return record if isinstance(record, dict) else {}


def _to_disk(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


@contextmanager
def _named_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        remedy = "check the disk; the same command goes on from what is written"
        raise UserError("output", f"{path} cannot be written ({error.strerror})", remedy) from error
