"""Alarms are functions of a run's metrics: each goes on past its threshold, once, and off again; a replay gives the same.

Leaves out the passes of alarms/checks.py and what an alarm does to a run (tests/runs/test_alarms_in_training.py), and which
thresholds are good ones (benchmarks/alarms.py).
"""

from dataclasses import fields, replace

import pytest

from g2r_megatron.alarms.rules import RULES
from g2r_megatron.alarms.watch import Watch
from g2r_megatron.config.alarm_options import ALARMS, AlarmsConfig
from g2r_megatron.config.ranges import TRAIN_RANGES
from g2r_megatron.credit.faithfulness import CREDIT, FEWEST_PAIRS, PAIRS, PLACEBO

QUIET = replace(AlarmsConfig(window=2), **dict.fromkeys(ALARMS))


def watch(**thresholds) -> Watch:
    return Watch(replace(QUIET, **thresholds))


def fired(watching: Watch, records: list[dict]) -> list[tuple[int, str]]:
    return [(a.step, a.rule.name) for step, record in enumerate(records) for a in watching.observe(step, record)]


def evaluations(judge: list[float], gold: list[float], key: str = "eval/gold_score") -> list[dict]:
    return [{"eval/judge_score": a, key: b} for a, b in zip(judge, gold, strict=True)]


def test_every_threshold_is_a_rule_and_has_a_range():
    assert [rule.name for rule in RULES] and {rule.name for rule in RULES} == set(ALARMS)
    assert {f"alarms.{name}" for name in ALARMS} <= set(TRAIN_RANGES)
    assert len(ALARMS) == 11 and len(fields(AlarmsConfig)) == 5 + len(ALARMS)


@pytest.mark.parametrize(
    ("name", "threshold", "key", "good", "bad"),
    [
        ("one_sided", 0.9, "judge/true_share", 0.5, 1.0),
        ("one_sided", 0.9, "judge/true_share", 0.5, 0.0),
        ("flat", 0.95, "attribution/ess_share", 0.9, 1.0),
        ("one_token", 0.5, "attribution/one_token_share", 0.2, 0.9),
    ],
)
def test_means_of_steps(name, threshold, key, good, bad):
    """Two good steps, then bad ones: the mean of the last two decides, a single step does not; it goes on once, and off."""
    records = [{key: value} for value in (good, good, bad, bad, bad, good, good, bad, bad)]
    assert fired(watch(**{name: threshold}), records)[0][1] == name
    assert len(fired(watch(**{name: threshold}), records)) == 2
    assert fired(watch(**{name: threshold}), records[:2]) == []
    assert fired(watch(**{name: threshold}), [{key: bad}]) == []  # fewer steps than the window


@pytest.mark.parametrize(
    ("name", "threshold", "key", "good", "bad"),
    [
        ("master_keys", 0.3, "alarms/master_keys", 0.1, 0.5),
        ("gold_agreement", 0.7, "eval/gold_agreement", 0.9, 0.6),
        ("exploitation", 0.5, "eval/exploitation_rate", 0.1, 0.6),
    ],
)
def test_last_measurements(name, threshold, key, good, bad):
    records = [{key: good}, {}, {key: bad}, {}, {key: bad}, {key: good}]
    assert fired(watch(**{name: threshold}), records) == [(2, name)]


def test_answer_mass_is_told_from_the_first_step_on():
    assert fired(watch(answer_mass=0.5), [{"judge/answer_mass": 0.3}]) == [(0, "answer_mass")]
    assert fired(watch(answer_mass=0.5), [{"judge/answer_mass": value} for value in (0.6, 0.3, 0.3)]) == [
        (1, "answer_mass")
    ]


def test_credit_no_better_than_shuffled():
    """Told from enough pairs on, with a running mean that is not above that of the placebo."""

    def records(credit: float, pairs: float = FEWEST_PAIRS) -> list[dict]:
        return [{CREDIT: credit, PLACEBO: 0.03, PAIRS: pairs}, {}]

    assert fired(watch(faithless=0.0), records(0.02)) == [(0, "faithless")]
    assert (
        fired(watch(faithless=0.0), records(0.5)) == fired(watch(faithless=0.0), records(0.02, FEWEST_PAIRS - 1)) == []
    )
    for what, falls_back in (("warn", False), ("grpo", True)):
        watching = Watch(replace(QUIET, faithless=0.0, on_faithless=what))
        assert not watching.uses_sequence_credit
        fired(watching, records(0.02))
        assert watching.uses_sequence_credit == falls_back


@pytest.mark.parametrize("key", ["eval/gold_score", "eval/true_score"])
def test_gold_falls_while_the_judge_is_pleased(key):
    """The fall counts from the best evaluation; it does not count when the judge's score fell as well."""
    assert fired(watch(gold_down=0.03), evaluations([0.3, 0.5, 0.6], [0.3, 0.5, 0.46], key)) == [(2, "gold_down")]
    assert fired(watch(gold_down=0.03), evaluations([0.3, 0.5, 0.4], [0.3, 0.5, 0.4], key)) == []
    assert fired(watch(gold_down=0.03), evaluations([0.3, 0.5, 0.6], [0.3, 0.5, 0.48], key)) == []


def test_length_drifts_either_way():
    def records(lengths):
        return [{"response/length_mean": value} for value in lengths]

    assert fired(watch(length=1.5), records([10, 10, 14, 14, 20, 20])) == [(4, "length")]
    assert fired(watch(length=1.5), records([20, 20, 14, 10, 10])) == [(3, "length")]
    assert fired(watch(length=1.5), records([20, 20, 19, 21, 22])) == []


def test_internalization_falls_from_its_peak():
    records = [{"alarms/internalization_gap": value} for value in (0.1, 0.4, 0.4, 0.4, 0.0, 0.2)]
    assert fired(watch(internalization=0.15), records) == [(5, "internalization")]


def test_an_alarm_says_what_it_means_and_what_to_do():
    watching = watch(answer_mass=0.5)
    (alarm,) = watching.observe(7, {"judge/answer_mass": 0.1})
    assert alarm.text.startswith(
        "step 7: alarm answer_mass: judge/answer_mass 0.1, below alarms.answer_mass 0.5: the judge"
    )
    assert "look at judge.template" in alarm.text and "\n" not in alarm.text
    assert alarm.record["step"] == 7 and alarm.record["curve"] == "judge/answer_mass"


def test_a_resumed_run_replays_what_it_has_written():
    """What was on stays on without being told again; values that were not finite (null in the file) count as not measured."""
    records = [{"judge/answer_mass": 0.1}] * 3 + [{"judge/answer_mass": None}]
    history = [{"step": step, **record} for step, record in enumerate(records)]
    resumed = Watch(replace(QUIET, answer_mass=0.5), history)
    assert list(resumed.on) == ["answer_mass"] and resumed.observe(4, {"judge/answer_mass": 0.1}) == []
