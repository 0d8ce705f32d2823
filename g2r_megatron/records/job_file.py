"""Results of a long job, one JSON line each: kept when the process dies, and found again by the same job."""

import json
import os
from collections.abc import Iterable
from pathlib import Path

from g2r_megatron.errors import UserError, unwritable
from g2r_megatron.records.files import make_directory, replace_text


class JobFile:
    """The file ``path``, on rank 0; ``records``: what an earlier process has appended to it."""

    def __init__(self, path: Path, key: str):
        """``key`` names the job: options, rows and models. Raises ``UserError`` if the file is another job's, or cannot be made."""
        make_directory(path.parent)
        self.path = path
        self.records = self._read(key)
        kept = [{"job": key}, *self.records]
        replace_text(path, "".join(json.dumps(record) + "\n" for record in kept))  # without a line cut short

    def _read(self, key: str) -> list[dict]:
        if not self.path.exists():
            return []
        try:
            lines = self.path.read_text(encoding="utf-8").split("\n")[:-1]
        except (OSError, UnicodeDecodeError) as error:
            found = f"{self.path} is there and cannot be read ({type(error).__name__})"
            raise UserError("output", found, "give another directory") from error
        records = []
        for line in lines:
            try:
                records.append(json.loads(line))
            except ValueError:  # blocks that never reached the disk: what follows is done again
                break
        if len(records) == 1 and isinstance(records[0], dict) and list(records[0]) == ["job"]:
            return []  # another job's, which ended before it had anything
        if not records or records[0] != {"job": key}:
            remedy = "repeat that command, or give another directory"
            raise UserError("output", f"{self.path} was begun with other options, rows or models", remedy)
        return records[1:]

    def append(self, records: Iterable[dict]) -> None:
        """Append records. They are on the disk when this returns. Raises ``UserError`` if that fails."""
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(record) + "\n" for record in records)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise unwritable(self.path, error) from error
