"""What a probe has measured so far: one line a row judged or pair measured, kept when the process dies."""

import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path

from g2r_megatron.errors import UserError, unwritable
from g2r_megatron.probe.pairs import Pair, RowVerdicts
from g2r_megatron.records.files import make_directory, replace_text

NAME = "measured.jsonl"


@dataclass
class Ledger:
    """``rows``: verdicts by the row's number; ``pairs`` by (row, item)."""

    rows: dict[int, RowVerdicts] = field(default_factory=dict)
    pairs: dict[tuple[int, int], Pair] = field(default_factory=dict)

    def add(self, record: dict) -> None:
        """A line of the file, as ``LedgerFile`` writes it."""
        if "pair" in record:
            pair = Pair(**record["pair"])
            self.pairs[pair.row, pair.item] = pair
        else:
            self.rows[record["row"]] = RowVerdicts(**record["verdicts"])


class LedgerFile:
    """The file of a ``Ledger`` in ``directory``, on rank 0. ``key`` names the job: options, rows and judge."""

    def __init__(self, directory: Path, key: str):
        """Raises ``UserError`` if the directory cannot be made, or holds another job's file."""
        make_directory(directory)
        self.path, self.ledger = directory / NAME, Ledger()
        kept = [{"job": key}, *self._read(key)]
        replace_text(self.path, "".join(json.dumps(record) + "\n" for record in kept))  # without a line cut short
        for record in kept[1:]:
            self.ledger.add(record)

    def _read(self, key: str) -> list[dict]:
        if not self.path.exists():
            return []
        records = []
        for line in self.path.read_text(encoding="utf-8").split("\n")[:-1]:
            try:
                records.append(json.loads(line))
            except ValueError:  # blocks that never reached the disk: what follows is measured again
                break
        if not records or records[0] != {"job": key}:
            remedy = "repeat that command, or give another directory"
            raise UserError("output", f"{self.path} was begun with other options, rows or judge", remedy)
        return records[1:]

    def rows(self, found: dict[int, RowVerdicts]) -> None:
        """Append the verdicts of rows."""
        self._append([{"row": row, "verdicts": asdict(verdicts)} for row, verdicts in found.items()])

    def pairs(self, found: list[Pair]) -> None:
        """Append measured pairs."""
        self._append([{"pair": asdict(pair)} for pair in found])

    def _append(self, records: list[dict]) -> None:
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(record) + "\n" for record in records)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise unwritable(self.path, error) from error
