"""What an evaluation has done so far: one line a response sampled or judged, kept when the process dies."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch.distributed as dist

from g2r_megatron.credit.judgements import JudgementRow, from_values
from g2r_megatron.eval.records import Answer
from g2r_megatron.parallel.agreement import raised_by_all
from g2r_megatron.records.job_file import JobFile

NAME = "done.jsonl"


@dataclass
class Ledger:
    """By the response's place in the evaluation: what was sampled, and the judge's values (``Judgement.values``) or the

    verifier's verdict.
    """

    answers: dict[int, Answer] = field(default_factory=dict)
    verdicts: dict[int, list[list]] = field(default_factory=dict)
    right: dict[int, bool] = field(default_factory=dict)

    def judgements(self, place: int) -> JudgementRow:
        """What the judge said of a response that is judged."""
        return [from_values(values) for values in self.verdicts[place]]


class LedgerFile:
    """The ledger on every rank, and on rank 0 its file."""

    def __init__(self, directory: Path, key: str):
        """``key`` names the job (collective). Raises ``UserError`` if the directory is another job's, or cannot be made."""
        self._file = None
        with raised_by_all():
            if dist.get_rank() == 0:
                self._file = JobFile(directory / NAME, key)
        self.is_writer = self._file is not None
        box = [self._file.records if self._file else None]
        dist.broadcast_object_list(box, src=0)
        self.ledger = Ledger()
        for record in box[0]:
            if "answer" in record:
                self.ledger.answers[record["place"]] = Answer(**record["answer"])
            elif "right" in record:
                self.ledger.right[record["place"]] = record["right"]
            else:
                self.ledger.verdicts[record["place"]] = record["verdicts"]

    def sampled(self, places: Sequence[int], answers: Sequence[Answer]) -> None:
        """Add what was sampled."""
        self.ledger.answers |= zip(places, answers, strict=True)
        self._append([{"place": p, "answer": asdict(a)} for p, a in zip(places, answers, strict=True)])

    def judged(self, places: Sequence[int], rows: Sequence[JudgementRow]) -> None:
        """Add judgements."""
        values = [[judgement.values() for judgement in row] for row in rows]
        self.ledger.verdicts |= zip(places, values, strict=True)
        self._append([{"place": p, "verdicts": v} for p, v in zip(places, values, strict=True)])

    def verified(self, places: Sequence[int], right: Sequence[bool]) -> None:
        """Add the verifier's verdicts."""
        self.ledger.right |= zip(places, right, strict=True)
        self._append([{"place": p, "right": r} for p, r in zip(places, right, strict=True)])

    def _append(self, records: list[dict]) -> None:
        if self._file is not None:
            self._file.append(records)
