"""Finds what is in a model directory in the place of a file: a pointer, a web page, a part of a download."""

from pathlib import Path

from g2r_megatron.errors import UserError

HEAD_BYTES = 64  # enough to tell them apart
STAND_INS = (  # (beginning, what it is, remedy)
    (b"version http", "is a Git LFS pointer, not the file itself", "fetch it with git lfs pull"),
    (b"# xet version", "is a Git Xet pointer, not the file itself", "fetch it with git xet, or with hf download"),
    (b"<!doctype html", "is a web page, not the file itself", "download the file again; a login may be needed"),
    (b"<html", "is a web page, not the file itself", "download the file again; a login may be needed"),
)
UNFINISHED = (".incomplete", ".part", ".aria2", ".crdownload", ".download", ".tmp")
DOWNLOADS = ".cache/huggingface/download"  # where hf download --local-dir keeps what it has not finished


def refuse_stand_in(file: Path, head: bytes) -> None:
    """Raise ``UserError`` when ``head``, the file's first ``HEAD_BYTES`` bytes, shows that it is a pointer or a web page."""
    for beginning, found, remedy in STAND_INS:
        if head.lstrip().lower().startswith(beginning):
            raise UserError(str(file), found, remedy)


def check_stand_ins(*files: Path) -> None:
    """``refuse_stand_in`` for each file that is there and can be read."""
    for file in files:
        if file.is_file():
            try:
                with file.open("rb") as stream:
                    head = stream.read(HEAD_BYTES)
            except OSError as error:
                raise UserError(str(file), f"cannot be read ({error.strerror})", "restore the file") from error
            refuse_stand_in(file, head)


def unfinished_download(directory: Path) -> Path | None:
    """A file in ``directory`` that a download has not finished, if there is one."""
    places = (directory, directory / DOWNLOADS)
    files = (file for place in places if place.is_dir() for file in sorted(place.iterdir()))
    return next((file for file in files if file.suffix in UNFINISHED), None)
