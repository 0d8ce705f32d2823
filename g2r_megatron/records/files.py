"""Writes files of a run directory whole. A failure is one ``UserError``."""

import os
from pathlib import Path

from g2r_megatron.errors import unwritable


def replace_text(path: Path, text: str, sync: bool = False) -> None:
    """As ``replace_bytes``, in UTF-8."""
    replace_bytes(path, text.encode(), sync)


def replace_bytes(path: Path, content: bytes, sync: bool = False) -> None:
    """Write ``path`` so that a reader, or a run killed right here, finds the old content or the new one.

    ``sync``: the content is on disk when this returns. Raises ``UserError`` when it cannot be written.
    """
    temporary = path.with_name(f"{path.name}.{os.environ.get('RANK', '0')}.tmp")  # two failing ranks may write at once
    try:
        with temporary.open("wb") as file:
            file.write(content)
            if sync:
                file.flush()
                os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise unwritable(path, error) from error


def make_directory(path: Path) -> None:
    """``path`` and its parents, if they are not there. Raises ``UserError`` when they cannot be made."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise unwritable(path, error) from error
