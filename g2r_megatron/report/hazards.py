"""The known hazards of the method. Each is one number of a run, with a level; a number beyond its level is marked.

If an alarm watches the same number, the alarm's default threshold is the level.
"""

from collections.abc import Callable
from dataclasses import dataclass

from g2r_megatron.config.alarm_options import AlarmsConfig
from g2r_megatron.report.runs import Run

LEVELS = AlarmsConfig()


@dataclass(frozen=True)
class Hazard:
    """One hazard. ``of_run``: its number, or None if the run did not log it. ``is_flagged``: whether a number is beyond the level."""

    label: str
    meaning: str
    form: str
    of_run: Callable[[Run], float | None]
    is_flagged: Callable[[float], bool]


def _average(key: str) -> Callable[[Run], float | None]:
    return lambda run: run.average(key)


def _last(key: str) -> Callable[[Run], float | None]:
    return lambda run: run.last(key)


def _ramp(run: Run) -> float | None:
    first, last = run.average("advantage/position_0"), run.average("advantage/position_9")
    return None if first is None or last is None else first - last


def _growth(run: Run) -> float | None:
    first, last = run.first("response/length_mean"), run.last("response/length_mean")
    return last / first - 1 if first and last else None  # above -1


def _key_ratio(run: Run) -> float | None:
    mass, chance = run.average("attribution/key_token_mass"), run.average("attribution/key_token_chance")
    return mass / chance if mass is not None and chance else None


def _above_shuffled(run: Run) -> float | None:
    credit, shuffled = run.series("attribution/faithfulness"), run.series("attribution/faithfulness_shuffled")
    return credit[-1][1] - shuffled[-1][1] if credit and shuffled else None


HAZARDS = (
    Hazard(
        "Flat attribution",
        f"mean ESS/T of alpha; ▲ > {LEVELS.flat:g}",
        "{:.2f}",
        _average("attribution/ess_share"),
        lambda v: v > LEVELS.flat,
    ),
    Hazard(
        "Flat responses",
        "share of attributions; ▲ > 0.5",
        "{:.2f}",
        _average("attribution/flat_share"),
        lambda v: v > 0.5,
    ),
    Hazard(
        "Cancelling gradient",
        "median |cos(g, e)|; ▲ < 0.02",
        "{:.3f}",
        _average("attribution/cos_median"),
        lambda v: v < 0.02,
    ),
    Hazard(
        "Faithfulness of credit",
        f"with hidden sentences, minus shuffled; ▲ < {LEVELS.faithless:g}",
        "{:+z.2f}",
        _above_shuffled,
        lambda v: v < LEVELS.faithless,
    ),
    Hazard("Credit on key tokens", "times chance; ▲ < 1.2", "{:.1f}×", _key_ratio, lambda v: v < 1.2),
    Hazard(
        "Broken judge gradients",
        "zero or not finite, all steps; ▲ > 0",
        "{:.0f}",
        lambda run: run.total("attribution/zero_or_nonfinite"),
        lambda v: v > 0,
    ),
    Hazard(
        "Position ramp", "advantage, first tenth − last tenth; ▲ beyond ±0.5", "{:+z.2f}", _ramp, lambda v: abs(v) > 0.5
    ),
    Hazard(
        "Stop token",
        "mean advantage; ▲ beyond ±0.5",
        "{:+z.2f}",
        _average("advantage/stop_token"),
        lambda v: abs(v) > 0.5,
    ),
    Hazard(
        "Length drift",
        f"response length, end against start; ▲ a factor above {LEVELS.length:g}, either way",
        "{:+z.0%}",
        _growth,
        lambda v: max(1 + v, 1 / (1 + v)) > LEVELS.length,
    ),
    Hazard(
        "Judge − true score",
        "at the last evaluation; ▲ > 0.05",
        "{:+z.3f}",
        lambda run: run.judge_gap,
        lambda v: v > 0.05,
    ),
    Hazard(
        "Answer mass",
        f"mean p(True) + p(False); ▲ < {LEVELS.answer_mass:g}",
        "{:.3f}",
        _average("judge/answer_mass"),
        lambda v: v < LEVELS.answer_mass,
    ),
    Hazard("Judge agreement", "with the truth; ▲ < 0.9", "{:.3f}", _average("judge/agreement"), lambda v: v < 0.9),
    Hazard(
        "Groups without variance",
        "share, teach nothing; ▲ > 0.5",
        "{:.2f}",
        _average("group/zero_variance_share"),
        lambda v: v > 0.5,
    ),
    Hazard("Clipped ratios", "share of tokens; ▲ > 0.3", "{:.3f}", _average("ratio/clip_share"), lambda v: v > 0.3),
    Hazard(
        "Sampler and trainer",
        "KL a token of the rollout engine; ▲ > 0.01",
        "{:.5f}",
        _average("rollout/kl"),
        lambda v: v > 0.01,
    ),
    Hazard(
        "Corrected tokens",
        "share clipped or masked by rollout.correction; ▲ > 0.1",
        "{:.3f}",
        _average("rollout/corrected_share"),
        lambda v: v > 0.1,
    ),
    Hazard("KL to the initial policy", "at the end", "{:.4f}", _last("loss/kl"), lambda v: False),
)
