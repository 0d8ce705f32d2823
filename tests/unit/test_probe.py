"""What the probe makes of its measurements: correlations, intervals, the sample of pairs, the line for a person, the page.

Leaves out the measurements themselves (test_hiding.py, test_parity_gates.py) and the command (test_probe_command.py).
"""

from dataclasses import replace
from random import Random

import pytest

from g2r_megatron.config.options import JudgeConfig
from g2r_megatron.credit.faithfulness import spearman
from g2r_megatron.data.types import Query, RubricItem
from g2r_megatron.errors import UserError
from g2r_megatron.probe.measure import swapped_template
from g2r_megatron.probe.page import probe_page
from g2r_megatron.probe.pairs import Pair, Response, RowVerdicts, choose, rows_with
from g2r_megatron.probe.statistics import interval, judge_summary, same_top, summary, verdict_line
from g2r_megatron.probe.table import summary_table
from g2r_megatron.records.job_file import JobFile

METHODS = ["gate_branch", "contracted"]


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ([1, 2, 3], [10, 20, 30], 1.0),
        ([1, 2, 3], [3, 2, 1], -1.0),
        ([1, 2, 3, 4], [2, 1, 4, 3], 0.6),
        ([1, 1, 2], [1, 2, 3], 3**0.5 / 2),  # ties share the mean of their places
        ([1, 1, 1], [1, 2, 3], 0.0),
    ],
)
def test_spearman(first, second, expected):
    assert spearman(first, second) == pytest.approx(expected)
    assert spearman(second, first) == pytest.approx(expected)


def test_same_top():
    assert same_top([0.1, 3.0, -5.0], [1.0, 2.0, 0.0]) == 1 and same_top([9.0, 3.0], [1.0, 2.0]) == 0


def test_the_interval_resamples_responses():
    """Pairs of one response move together: copies of a pair make the interval no narrower. The same seed, the same numbers."""
    values = [Random(n).random() for n in range(20)]
    once = interval(values, list(range(20)), 7)
    assert once[0] == pytest.approx(sum(values) / 20) and once[1] < once[0] < once[2]
    assert interval(values * 4, list(range(20)) * 4, 7) == pytest.approx(once)
    assert interval([0.5] * 4, [0, 1, 2, 3], 7) == pytest.approx([0.5] * 3)


def row_of(*verdicts: bool) -> RowVerdicts:
    plain = [[0.6, 0.1] if verdict else [0.1, 0.3] for verdict in verdicts]
    return RowVerdicts(plain, None, [[0.1, 0.6]] * len(plain))


def response(row: int) -> Response:
    return Response(row, Query(str(row), (), ()), [], [])


def test_the_sample_takes_one_pair_of_each_response_first():
    rows = [row_of(True, True, False), row_of(False), row_of(True, True), row_of(True)]
    responses = [response(row) for row in range(4)]
    three = choose(responses, rows, True, 3, seed=1)
    assert [place for place, _ in three] == [0, 2, 3]
    everything = choose(responses, rows, True, 99, seed=1)
    assert everything[:3] == three and sorted(everything) == [(0, 0), (0, 1), (2, 0), (2, 1), (3, 0)]
    assert choose(responses, rows, False, 99, seed=1) == [(0, 2), (1, 0)]
    assert rows_with(rows, True) == 3 and rows_with(rows, False) == 2


def test_verdict_words_change_places():
    assert swapped_template(JudgeConfig()).endswith("Answer False or True only.")
    assert swapped_template(JudgeConfig(template="{conversation}{response}{criterion} True?")) is None


def test_the_judges_answers():
    found = judge_summary([row_of(True, False), row_of(True, True)])
    assert found["items"] == 4 and found["true_rate"] == 0.75 and found["swapped_same"] is None
    assert found["answer_mass"] == pytest.approx((3 * 0.7 + 0.4) / 4)
    assert found["negated_true_rate"] == 0 and found["negated_opposite"] == 0.75


def scored(mean: float, low: float, high: float, seconds: float = 1.0) -> dict:
    return {"masked": {"spearman": [mean, low, high]}, "seconds": seconds}


def test_the_line_names_the_cheapest_of_the_best():
    """An attribution must be above 0 and above the placebo with its whole interval; occlusion is the truth, and no candidate."""
    placebo = {"shuffled": scored(0.01, -0.1, 0.12)}
    good = {"gate_branch": scored(0.57, 0.5, 0.64), "gate_all": scored(0.6, 0.52, 0.66, seconds=3)}
    bad = {"contracted": scored(0.02, -0.1, 0.3), "occlusion": scored(1, 1, 1, seconds=9)}
    assert verdict_line({**good, **bad, **placebo}) == (
        "credit from `gate_all` (.60), `gate_branch` (.57) follows what this judge uses (shuffled .01); "
        "`contracted` (.02) does not: use `gate_branch`"
    )
    assert "follows what this reward model uses" in verdict_line({**good, **placebo}, "reward model")
    few = {"gate_branch": scored(0.5, 0.3, 0.7), "shuffled": scored(0, -0.5, 0.6)}
    assert (
        verdict_line(few) == "too few pairs to tell `gate_branch` (.50) from shuffled .00 (up to .60): raise --sample"
    )
    assert verdict_line({**bad, **placebo}).startswith(
        "no credit follows what this judge uses: `contracted` (.02), shuffled"
    )
    alone = verdict_line({"occlusion": scored(1, 1, 1), **placebo})
    assert "masking itself" in alone and "train without" not in alone


def test_a_ledger_that_holds_nothing_blocks_nobody(tmp_path):
    """A job that failed before it had anything leaves its directory to the corrected command; one that has something does not."""
    JobFile(tmp_path / "measured.jsonl", "wrong judge")
    JobFile(tmp_path / "measured.jsonl", "right judge").append([{"row": 0}])
    assert JobFile(tmp_path / "measured.jsonl", "right judge").records == [{"row": 0}]
    with pytest.raises(UserError, match="begun with other options"):
        JobFile(tmp_path / "measured.jsonl", "third judge")
    (tmp_path / "directory").mkdir()
    with pytest.raises(UserError, match="cannot be read"):
        JobFile(tmp_path / "directory", "right judge")


def pairs() -> list[Pair]:
    """Of 12 responses; gate_branch follows the truth, contracted is against it."""
    found = []
    for n in range(12):
        masked = [Random(10 * n + k).gauss(0, 1) for k in range(4)]
        credit = {"gate_branch": masked, "contracted": [-x for x in masked], "shuffled": masked[2:] + masked[:2]}
        seconds = {"gate_branch": 1.0, "contracted": 2.0, "masked": 3.0, "deleted": 4.0}
        found.append(Pair(n, 0, n != 11, masked, masked, credit, dict.fromkeys(credit, 0.5), seconds))
    return found


def test_summary_and_page():
    """Numbers of True pairs alone; text of rows cannot act in the page, and the page asks nothing of the network."""
    found = {"judge_model": "</title><b>judge", **summary(pairs(), [row_of(True, False)] * 12, METHODS, 3)}
    assert (found["pairs_true"], found["pairs_false"], found["responses"]) == (11, 1, 12)
    of_true = found["true"]["attributions"]
    assert of_true["gate_branch"]["masked"]["spearman"] == pytest.approx([1, 1, 1])
    assert of_true["gate_branch"]["masked"]["top"][0] == 1
    assert (
        of_true["contracted"]["deleted"]["spearman"][0] == pytest.approx(-1) and of_true["contracted"]["seconds"] == 2
    )
    assert found["line"].endswith("use `gate_branch`") and found["top_by_chance"] == 0.25
    text = summary_table(found)
    assert "pairs judged False" in text and "50%" in text and "+1.00 [+1.00, +1.00]" in text
    tokens = ["<script>alert(1)</script>", " a", " b", "\u202e."]
    described = [
        {
            "id": "<i>",
            "criterion": "<img src=x>",
            "tokens": tokens,
            "sentences": [(k, k + 1) for k in range(4)],
            **vars(pair),
        }
        for pair in pairs()
    ]
    page = probe_page(found, described)
    assert page.count("<script>") == 1 and "<img" not in page and "<i>" not in page and "<b>judge" not in page
    assert "http" not in page.replace("http-equiv", "") and "\u202e" not in page and "&lt;img src=x&gt;" in page


def test_a_reward_models_scores():
    """One table, no verdicts of True and False, and the line speaks of a reward model."""
    scored_pairs = [replace(pair, verdict=None) for pair in pairs()]
    found = summary(scored_pairs, [], METHODS, 3)
    assert "this reward model uses" in found["line"] and "true" not in found and "judge" not in found
    assert found["score"]["attributions"]["gate_branch"]["masked"]["spearman"] == pytest.approx([1, 1, 1])
    text = summary_table(found)
    assert "scored responses" in text and "12 responses scored" in text and "True" not in text


def test_query_of_a_pair_is_left_alone():
    """The negated criterion is a question of its own; the item keeps its weight."""
    from g2r_megatron.probe.measure import _negated

    query = Query("a", (), (RubricItem("is short", -2.0),))
    assert _negated(query).rubric == (RubricItem("It is not true that: is short", -2.0),)
