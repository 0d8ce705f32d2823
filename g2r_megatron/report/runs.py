"""Runs as the report and the table show them: reads run directories, groups seeds, and derives numbers."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path

import yaml

from g2r_megatron.errors import UserError
from g2r_megatron.records.metrics_log import ALARMS_FILE, SAMPLES_FILE, read_alarms, read_metrics, read_samples
from g2r_megatron.report.evaluations import Evaluations, load_evaluations

CONFIG_FILE = "config.yaml"
TARGET_SCORE = 0.65  # the score of "steps to 0.65", by which runs of the quickstart task are compared
WINDOW = 3  # steps; curves of training batches show the mean of the last so many

# A preset has the same colour in every report. Variants of a preset and other groups get the next free colours.
SLOT_OF_PRESET = {"grpo": 0, "paper": 1, "robust": 2}
# Options that do not change the training. Runs that differ in these alone are seeds of one group.
NOT_IN_GROUP = {"seed", "output_dir", "log", "checkpoint", "alarms", "timeout_minutes"}
SAMPLE_FIELDS = {
    "query_id",
    "prompt",
    "response",
    "reward",
    "true_reward",
    "tokens",
    "advantages",
    "token_rewards",
    "items",
}
ALARM_FIELDS = {"step", "alarm", "curve", "value", "threshold", "advice"}


@dataclass(frozen=True)
class Run:
    """One run directory. ``rows``: one dict for each step, in order, with the metrics that have a value."""

    path: Path
    config: dict
    rows: list[dict[str, float]]
    samples: list[dict] = field(repr=False)
    alarms: list[dict] = field(default_factory=list)
    evaluations: Evaluations = field(default_factory=Evaluations, repr=False)

    @property
    def preset(self) -> str:
        return str(self.config.get("grpo", {}).get("preset", "?"))

    @property
    def seed(self) -> str:
        return str(self.config.get("seed", "?"))

    def series(self, key: str) -> list[tuple[int, float]]:
        """(step, value) of every step that logged ``key``."""
        return [(int(row["step"]), row[key]) for row in self.rows if key in row]

    def smooth(self, key: str) -> list[tuple[int, float]]:
        """``series`` as the mean of the last ``WINDOW`` logged steps. It begins at the first step that has so many."""
        points = self.series(key)
        return [
            (points[i][0], mean([value for _, value in points[i + 1 - WINDOW : i + 1]]))
            for i in range(WINDOW - 1, len(points))
        ]

    def first(self, key: str) -> float | None:
        """Mean over the first ``WINDOW`` steps that logged ``key``."""
        return mean([value for _, value in self.series(key)[:WINDOW]])

    def last(self, key: str) -> float | None:
        """Mean over the last ``WINDOW`` steps that logged ``key``."""
        return mean([value for _, value in self.series(key)[-WINDOW:]])

    def average(self, key: str) -> float | None:
        """Mean over all steps that logged ``key``."""
        return mean([value for _, value in self.series(key)])

    def total(self, key: str) -> float | None:
        """Sum over all steps that logged ``key``."""
        values = [value for _, value in self.series(key)]
        return sum(values) if values else None

    def change(self, key: str) -> tuple[float, float] | None:
        """First and last value of an evaluation metric. None if there are fewer than two evaluations."""
        points = self.series(key)
        return (points[0][1], points[-1][1]) if len(points) > 1 else None

    @property
    def steps_to_target(self) -> int | None:
        """First step at which the 3-step mean of the training batches' true score reaches ``TARGET_SCORE``."""
        return next((step for step, value in self.smooth("reward/true_mean") if value >= TARGET_SCORE), None)

    @property
    def seconds_to_target(self) -> float | None:
        """``time/step`` summed up to ``steps_to_target``: the time that the target needed, with the judge's time."""
        target = self.steps_to_target
        seconds = [value for step, value in self.series("time/step") if target is not None and step <= target]
        return sum(seconds) if seconds else None

    @property
    def judge_gap(self) -> float | None:
        """Judge score minus true score at the last evaluation."""
        judge, true = self.change("eval/judge_score"), self.change("eval/true_score")
        return judge[1] - true[1] if judge and true else None

    @property
    def last_step(self) -> int:
        return int(self.rows[-1]["step"])


@dataclass(frozen=True)
class Group:
    """Runs with the same options: the seeds of one preset, or of one variant of a preset."""

    label: str
    slot: int  # colour
    runs: list[Run]

    def values(self, number: Callable[[Run], float | None]) -> list[float]:
        """``number`` of each run that has one."""
        return [value for value in map(number, self.runs) if value is not None]

    def mean(self, number: Callable[[Run], float | None]) -> float | None:
        return mean(self.values(number))

    def curve(self, series: Callable[[Run], Sequence[tuple[float, float]]]) -> list[tuple[float, float, float, float]]:
        """(x, mean, lowest, highest) over the runs, at each x that all runs have."""
        curves = [dict(series(run)) for run in self.runs]
        common = sorted(set.intersection(*(set(curve) for curve in curves)))
        values = [[curve[x] for curve in curves] for x in common]
        return [(x, mean(ys), min(ys), max(ys)) for x, ys in zip(common, values, strict=True)]


@dataclass(frozen=True)
class Score:
    """A source of the columns "before" and "after". ``of_run``: both numbers, or None if the run does not have them."""

    label: str
    of_run: Callable[[Run], tuple[float, float] | None]


def _of_batches(key: str) -> Callable[[Run], tuple[float, float] | None]:
    return lambda run: (run.first(key), run.last(key)) if len(run.series(key)) >= WINDOW else None


SCORES = (
    Score("true score, held-out prompts", lambda run: run.change("eval/true_score")),
    Score("judge score, held-out prompts", lambda run: run.change("eval/judge_score")),
    Score("true score, training batches", _of_batches("reward/true_mean")),
    Score("judge score, training batches", _of_batches("reward/mean")),
)


def choose_score(groups: list[Group]) -> Score:
    """The first of ``SCORES`` that all runs have. If there is none, the last of ``SCORES``."""
    runs = [run for group in groups for run in group.runs]
    return next((score for score in SCORES if all(score.of_run(run) for run in runs)), SCORES[-1])


def mean(values: list[float]) -> float | None:
    """Arithmetic mean. None if ``values`` is empty."""
    return sum(values) / len(values) if values else None


def load_run(path: Path) -> Run:
    """Read a run directory. Raises ``UserError``: a directory or file is missing or broken, or no step is logged yet."""
    lines = read_metrics(path)
    if not lines:
        raise UserError(str(path), "its metrics.jsonl is empty", "let the run make a step first")
    rows: dict[int, dict] = {}
    for line in lines:
        rows.setdefault(line["step"], {}).update({key: value for key, value in line.items() if value is not None})
    samples = read_samples(path)
    for number, sample in enumerate(samples, 1):
        if missing := sorted(SAMPLE_FIELDS - sample.keys()):
            raise UserError(f"{path / SAMPLES_FILE}:{number}", f"no {', '.join(missing)}", "delete the line")
    alarms = read_alarms(path)
    for number, alarm in enumerate(alarms, 1):
        if missing := sorted(ALARM_FIELDS - alarm.keys()):
            raise UserError(f"{path / ALARMS_FILE}:{number}", f"no {', '.join(missing)}", "delete the line")
    config, steps = _read_config(path / CONFIG_FILE), sorted(rows)
    return Run(path, config, [rows[step] for step in steps], samples, alarms, load_evaluations(path, steps[-1]))


def load_groups(run_dirs: list[Path]) -> list[Group]:
    """The runs, grouped by their options, in the given order. A directory that is given twice counts once."""
    if not run_dirs:
        raise UserError("run directories", "none given", "give the output_dir of at least one g2r train run")
    paths = dict.fromkeys(Path(path).resolve() for path in run_dirs)
    runs_of: dict[str, list[Run]] = {}
    for run in map(load_run, paths):
        options = {key: value for key, value in run.config.items() if key not in NOT_IN_GROUP}
        runs_of.setdefault(json.dumps(options, sort_keys=True, default=str), []).append(run)
    labels = _labels([runs[0] for runs in runs_of.values()])
    further = count(len(SLOT_OF_PRESET))
    slots = [SLOT_OF_PRESET[label] if label in SLOT_OF_PRESET else next(further) for label in labels]
    return [Group(label, slot, runs) for label, slot, runs in zip(labels, slots, runs_of.values(), strict=True)]


def _labels(runs: list[Run]) -> list[str]:
    """The name of each group: its preset. If several groups have the same preset, with the options in which they differ."""
    flats = [_flatten(run.config) for run in runs]
    labels = []
    for run, flat in zip(runs, flats, strict=True):
        siblings = [other for other, other_run in zip(flats, runs, strict=True) if other_run.preset == run.preset]
        differing = [key for key in flat if any(other.get(key) != flat[key] for other in siblings)]
        shown = [f"{key}={_short_path(flat[key], [other.get(key) for other in siblings])}" for key in differing[:2]]
        suffix = ", ".join(shown) + (", …" if len(differing) > 2 else "")
        labels.append(f"{run.preset} ({suffix})" if suffix else run.preset)
    return labels


def _short_path(value: object, others: list[object]) -> str:
    """The last part of a path, if no other of ``others`` ends in the same. Any other value as on the command line."""
    if not isinstance(value, str) or "/" not in value:
        return "null" if value is None else str(value)
    name = Path(value).name
    alike = {str(other) for other in others if other is not None and Path(str(other)).name == name}
    return name if len(alike) == 1 else value


def _flatten(config: dict, prefix: str = "") -> dict[str, object]:
    flat: dict[str, object] = {}
    for key, value in config.items():
        if not prefix and key in NOT_IN_GROUP:
            continue
        if isinstance(value, dict):
            flat.update(_flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _read_config(path: Path) -> dict:
    remedy = "give the output_dir of a g2r train run"
    if not path.is_file():
        raise UserError(str(path), "no such file", remedy)
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise UserError(str(path), f"broken YAML ({error})", remedy) from error
    if not isinstance(config, dict):
        raise UserError(str(path), "not a mapping of options", remedy)
    return config
