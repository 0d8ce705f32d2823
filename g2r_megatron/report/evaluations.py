"""The results of a training's evaluations, by criterion and by tag."""

from dataclasses import dataclass, field
from pathlib import Path

from g2r_megatron.errors import UserError
from g2r_megatron.records.evaluations import evaluated_steps, read_results, step_directory


@dataclass
class Tally:
    """Counts of one criterion in one evaluation: responses judged and met; and the same by the gold judge or the truth."""

    judged: int = 0
    met: int = 0
    compared: int = 0
    met_by_gold: int = 0


@dataclass
class Criterion:
    """A rubric criterion of the held-out rows. ``weight``: of the first row that has it. ``by_step``: counts of each evaluation."""

    weight: float
    by_step: dict[int, Tally] = field(default_factory=dict)

    def shares(self, gold: bool = False) -> list[tuple[int, float]]:
        """(step, share of responses that meet the criterion), by the judge, or by the gold judge if ``gold``."""
        found = ((step, (t.met_by_gold, t.compared) if gold else (t.met, t.judged)) for step, t in self.by_step.items())
        return [(step, met / count) for step, (met, count) in found if count]

    @property
    def responses(self) -> int:
        """How many responses the last evaluation judged."""
        return self.by_step[max(self.by_step)].judged

    @property
    def change(self) -> float:
        """Change of the share met, from the first to the last evaluation."""
        shares = self.shares()
        return shares[-1][1] - shares[0][1]


@dataclass
class Evaluations:
    """All evaluations of a run. ``tags``: tag -> (step, score) by the data set's own definition."""

    criteria: dict[str, Criterion] = field(default_factory=dict)
    tags: dict[str, list[tuple[int, float]]] = field(default_factory=dict)


def load_evaluations(run: Path, last_step: int) -> Evaluations:
    """The evaluations of a run up to ``last_step``. Raises ``UserError`` if an evaluation did not write the files."""
    found = Evaluations()
    for step in evaluated_steps(run):
        if step <= last_step:
            directory = step_directory(run, step)
            summary, records = read_results(directory)
            try:
                _add(found, step, summary, records)
            except (AttributeError, KeyError, TypeError) as error:
                remedy = "delete the directory of this evaluation"
                raise UserError(str(directory), f"not as an evaluation writes it ({error!r})", remedy) from error
    return found


def _add(found: Evaluations, step: int, summary: dict, records: list[dict]) -> None:
    for dataset in summary["datasets"].values():
        for tag, score in dataset["tags"].items():
            found.tags.setdefault(tag, []).append((step, float(score["mean"])))
    for record in records:
        for item in record["items"]:
            criterion = found.criteria.setdefault(str(item["criterion"]), Criterion(float(item["weight"])))
            tally = criterion.by_step.setdefault(step, Tally())
            tally.judged += 1
            tally.met += bool(item["verdict"])
            if "gold" in item:
                tally.compared += 1
                tally.met_by_gold += bool(item["gold"])
