"""What a person sees while a run goes on: phase, step, reward and the time that is left."""

import sys
import time
from collections import deque
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, SpinnerColumn, TaskID, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

# (metric, label, format) in the order shown; one that a step did not log is left out
SHOWN = (
    ("reward/mean", "reward", "{:.3f}"),
    ("reward/true_mean", "true", "{:.3f}"),
    ("loss/policy", "loss", "{:.2e}"),
    ("eval/true_score", "eval true", "{:.3f}"),
    ("eval/judge_score", "eval judge", "{:.3f}"),
    ("eval/gold_score", "eval gold", "{:.3f}"),
    ("response/length_mean", "tokens", "{:.0f}"),
    ("time/step", "step", "{:.1f}s"),
)
RECENT_STEPS = 20  # the ETA follows the mean of this many last steps


class Progress:
    """A live line on a terminal; elsewhere (a pipe, a Slurm log) one plain line a step, without control codes.

    >>> with Progress(total_steps=50, enabled=rank == 0) as progress:
    ...     progress.phase("sample")        # sample, judge, update, eval, save
    ...     progress.step(1, {"reward/mean": 0.4})
    """

    def __init__(self, total_steps: int, enabled: bool):
        """``enabled``: false on every rank but the first; then nothing is ever written."""
        self.total_steps = total_steps
        self._enabled = enabled
        self._durations: deque[float] = deque(maxlen=RECENT_STEPS)  # seconds
        self._last_step_at = 0.0
        self._live: RichProgress | None = None
        self._task: TaskID | None = None

    def __enter__(self) -> Self:
        self._last_step_at = time.monotonic()
        # not Console.is_terminal: FORCE_COLOR would make it true for a pipe
        if self._enabled and sys.stdout.isatty():
            self._live = RichProgress(
                SpinnerColumn(),
                TextColumn("{task.fields[phase]:<6}", style="bold"),
                TextColumn("step {task.completed:.0f}/{task.total:.0f}"),
                BarColumn(bar_width=24),
                TextColumn("{task.fields[status]}", markup=False),
                console=Console(file=sys.stdout, force_terminal=True, highlight=False),
                transient=False,
            )
            self._task = self._live.add_task("", total=self.total_steps, phase="start", status="")
            self._live.start()
        return self

    def __exit__(self, *exc_info) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def phase(self, name: str) -> None:
        """What happens now, e.g. ``sample``; seen on a terminal only."""
        if self._live is not None:
            self._live.update(self._task, phase=name)

    def step(self, step: int, metrics: dict[str, float]) -> None:
        """``step`` steps of ``total_steps`` are done; ``metrics`` are those of the last one. 0: before training."""
        now = time.monotonic()
        if step > 0:
            self._durations.append(now - self._last_step_at)
        self._last_step_at = now
        if not self._enabled:
            return
        status = self._status(step, metrics)
        if self._live is None:
            print(f"step {step}/{self.total_steps}  {status}", flush=True)
        else:
            self._live.update(self._task, completed=step, status=status)

    def message(self, text: str) -> None:
        """One line that stays, e.g. a resume or a warning; it does not disturb the live line."""
        if self._live is not None:
            self._live.console.print(text, markup=False)
        elif self._enabled:
            print(text, flush=True)

    def _status(self, step: int, metrics: dict[str, float]) -> str:
        parts = [f"{label} {form.format(metrics[key])}" for key, label, form in SHOWN if metrics.get(key) is not None]
        if self._durations and step < self.total_steps:
            mean = sum(self._durations) / len(self._durations)
            parts.append(f"ETA {format_seconds(mean * (self.total_steps - step))}")
        return "  ".join(parts)


class CountProgress:
    """How many are done and the time left, on stderr: a bar on a terminal, elsewhere one plain line a batch."""

    def __init__(self, verb: str, noun: str, total: int, before: int, enabled: bool):
        """``verb``, ``noun``: as in "judged 3/8 rows"; ``before``: of ``total``, what an earlier process has done."""
        self.verb, self.noun = verb, noun
        self.total, self.before, self._enabled, self._start = total, before, enabled, time.monotonic()
        self._bar: RichProgress | None = None
        if enabled and sys.stderr.isatty():
            columns = (
                TextColumn(verb),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn(f"{noun}  ETA"),
                TimeRemainingColumn(),
            )
            self._bar = RichProgress(*columns, console=Console(stderr=True))
            self._task = self._bar.add_task("", total=total, completed=before)

    def __enter__(self) -> Self:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *exc_info) -> None:
        if self._bar is not None:
            self._bar.stop()

    def done(self, count: int) -> None:
        """``count`` of ``total`` are done."""
        if self._bar is not None:
            self._bar.update(self._task, completed=count)
        elif self._enabled:
            seconds = (time.monotonic() - self._start) / (count - self.before) * (self.total - count)
            print(
                f"{self.verb} {count}/{self.total} {self.noun}  ETA {format_seconds(seconds)}",
                file=sys.stderr,
                flush=True,
            )


def format_seconds(seconds: float) -> str:
    """``m:ss`` below an hour, else ``h:mm:ss``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
