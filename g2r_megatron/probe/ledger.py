"""What a probe has measured so far: one line a response sampled, row judged or pair measured, kept when the process dies."""

from dataclasses import asdict, dataclass, field
from pathlib import Path

from g2r_megatron.probe.pairs import Pair, RowVerdicts
from g2r_megatron.records.job_file import JobFile

NAME = "measured.jsonl"


@dataclass
class Ledger:
    """By the row's number: ``responses`` that were sampled and ``rows``, their verdicts; ``pairs`` by (row, item)."""

    responses: dict[int, str] = field(default_factory=dict)
    rows: dict[int, RowVerdicts] = field(default_factory=dict)
    pairs: dict[tuple[int, int], Pair] = field(default_factory=dict)

    def add(self, record: dict) -> None:
        """A line of the file, as ``LedgerFile`` writes it."""
        if "pair" in record:
            pair = Pair(**record["pair"])
            self.pairs[pair.row, pair.item] = pair
        elif "response" in record:
            self.responses[record["row"]] = record["response"]
        else:
            self.rows[record["row"]] = RowVerdicts(**record["verdicts"])


class LedgerFile:
    """The file of a ``Ledger`` in ``directory``, on rank 0. ``key`` names the job: options, rows and judge."""

    def __init__(self, directory: Path, key: str):
        """Raises ``UserError`` if the directory cannot be made, or holds another job's file."""
        self._file, self.ledger = JobFile(directory / NAME, key), Ledger()
        for record in self._file.records:
            self.ledger.add(record)

    def responses(self, found: dict[int, str]) -> None:
        """Append sampled responses of rows."""
        self._file.append({"row": row, "response": text} for row, text in found.items())

    def rows(self, found: dict[int, RowVerdicts]) -> None:
        """Append the verdicts of rows."""
        self._file.append({"row": row, "verdicts": asdict(verdicts)} for row, verdicts in found.items())

    def pairs(self, found: list[Pair]) -> None:
        """Append measured pairs."""
        self._file.append({"pair": asdict(pair)} for pair in found)
