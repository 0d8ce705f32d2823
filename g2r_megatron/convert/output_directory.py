"""New directories that are complete or absent, made by one process or by several together."""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch.distributed as dist

from g2r_megatron.errors import UserError, unwritable
from g2r_megatron.model.torch_dist import sync_directory, sync_to_disk
from g2r_megatron.parallel.agreement import raised_by_all

# In a directory that a conversion has begun. This file distinguishes our leftovers from a user's own NAME.incomplete.
MARKER = ".g2r_conversion"


def check_output(final: Path) -> None:
    """Raise ``UserError`` if ``final`` exists, or if NAME.incomplete does and is not the leftover of a conversion."""
    if final.exists() or final.is_symlink():
        raise UserError("--output", f"{final} exists", "choose a new name, or remove it first")
    temporary = _temporary(final)
    if (temporary.exists() or temporary.is_symlink()) and not _is_ours(temporary):
        raise UserError(
            "--output", f"{temporary} exists and was not left by an interrupted conversion", "rename or remove it"
        )
    parent = next(parent for parent in final.absolute().parents if parent.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise UserError("--output", f"{parent} is not a directory that can be written", "choose another place")


def check_free_space(final: Path, needed: int) -> None:
    """Raise ``UserError`` if ``needed`` bytes do not fit on the disk of ``final``, now; the leftover counts as free."""
    parent = next(parent for parent in final.absolute().parents if parent.exists())
    leftover = _temporary(final)
    freed = sum(f.stat().st_blocks * 512 for f in leftover.rglob("*") if f.is_file()) if leftover.is_dir() else 0
    free = shutil.disk_usage(parent).free + freed
    if free < needed:
        raise UserError("--output", f"{needed} bytes do not fit into {free} free ones", "free disk space")


@contextmanager
def new_directory(final: Path) -> Iterator[Path]:
    """NAME.incomplete to write into; it gets its name when the block ends. Collective; all disks are one.

    Every file but those of the first process must have been synced to disk by then. When the block raises, everything
    is removed. All processes must raise the block's errors together (``raised_by_all``).
    """
    temporary, first = _temporary(final), dist.get_rank() == 0
    with raised_by_all():
        if first:  # alone: the others would find the directory that it makes
            _make(final, temporary)
    try:
        yield temporary
        dist.barrier()
        with raised_by_all():
            if first:
                try:
                    sync_to_disk(temporary)
                    os.rename(temporary, final)
                    sync_directory(final.parent)
                except OSError as error:
                    raise unwritable(temporary, error) from error
    except BaseException:  # Ctrl-C too: half a model is useless
        if first and temporary.exists():
            _remove(temporary)
        raise
    if first:
        (final / MARKER).unlink()  # after the rename: a leftover without it would look like a user's directory
    dist.barrier()


def _make(final: Path, temporary: Path) -> None:
    check_output(final)
    try:
        if temporary.exists():
            _remove(temporary)
        temporary.mkdir(parents=True)
        (temporary / MARKER).touch()
    except OSError as error:
        raise unwritable(temporary, error) from error


def _remove(directory: Path) -> None:
    """The marker is removed last: so the rest of a killed removal is still recognised as ours."""
    for path in directory.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != MARKER:
            path.unlink()
    shutil.rmtree(directory)


def write_json(file: Path, content: dict) -> None:
    """Raises ``UserError`` when the disk refuses it."""
    try:
        file.write_text(json.dumps(content, indent=2) + "\n")
    except OSError as error:
        raise unwritable(file, error) from error


def _temporary(final: Path) -> Path:
    return final.with_name(final.name + ".incomplete")


def _is_ours(directory: Path) -> bool:
    """An empty directory counts: a conversion that was killed before it wrote its marker leaves one."""
    return directory.is_dir() and ((directory / MARKER).is_file() or not any(directory.iterdir()))
