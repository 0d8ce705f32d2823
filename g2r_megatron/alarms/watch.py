"""Watches the metrics of a run and says when an alarm goes on."""

from collections.abc import Sequence
from dataclasses import dataclass

from g2r_megatron.alarms.rules import RULES, Record, Rule
from g2r_megatron.config.alarm_options import AlarmsConfig


@dataclass(frozen=True)
class Alarm:
    """``rule`` went past ``threshold`` at ``step``."""

    step: int
    rule: Rule
    value: float
    threshold: float

    @property
    def text(self) -> str:
        side = "below" if self.rule.is_floor else "above"
        name = self.rule.name
        return (
            f"step {self.step}: alarm {name}: {self.rule.curve} {self.value:.3g}, {side} alarms.{name} {self.threshold:g}: "
            f"{self.advice}"
        )

    @property
    def advice(self) -> str:
        """What it means and what to do."""
        return f"{self.rule.meaning}; {self.rule.remedy}"

    @property
    def record(self) -> dict:
        """As a line of alarms.jsonl."""
        return {
            "step": self.step,
            "alarm": self.rule.name,
            "curve": self.rule.curve,
            "value": self.value,
            "threshold": self.threshold,
            "advice": self.advice,
            "text": self.text,
        }


class Watch:
    """The alarms of one run. The same records give the same alarms: a resumed run replays those it has written."""

    def __init__(self, options: AlarmsConfig, history: Sequence[Record] = ()):
        """``history``: the metrics of a run that is resumed."""
        self.options = options
        self.on: dict[str, Alarm] = {}  # alarms that are on, by name
        self._history: list[Record] = []
        for record in history:
            self.observe(int(record["step"]), {k: v for k, v in record.items() if v is not None})

    def observe(self, step: int, metrics: Record) -> list[Alarm]:
        """Take in the metrics of ``step``; the alarms that went on with them. One that is on is not told again."""
        self._history.append(metrics)
        new = []
        for rule in RULES:
            threshold = getattr(self.options, rule.name)
            value = None if threshold is None else rule.value(self._history, self.options.window)
            if value is None:
                continue
            if not rule.is_past(value, threshold):
                self.on.pop(rule.name, None)
            elif rule.name not in self.on:
                self.on[rule.name] = Alarm(step, rule, value, threshold)
                new.append(self.on[rule.name])
        return new

    @property
    def uses_sequence_credit(self) -> bool:
        """Whether credit has been found untrue, and training is to go on without it."""
        return self.options.on_faithless == "grpo" and "faithless" in self.on
