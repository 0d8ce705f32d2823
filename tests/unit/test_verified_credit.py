"""The verifier's verdicts in the judge stage: they are the reward, and credit is computed only where the judge agrees.

Leaves out real judges (runs/test_verifiable_training.py) and what a verifier decides (test_verifier.py).
"""

from g2r_megatron.credit.judgements import ItemJudgement, ScoreJudgement, from_values
from g2r_megatron.data.types import Query, RubricItem
from g2r_megatron.judge.parts import Part

QUERY = Query(
    "q", ({"role": "user", "content": "1 + 1"},), (RubricItem("right", 1.0),), answer="2", dataset="verifiable"
)


def test_the_verifier_decides():
    rows = [[ItemJudgement(0.9, 0.1, True)], [ItemJudgement(0.9, 0.1, True)], [ItemJudgement(0.2, 0.7, False)]]
    assert ItemJudgement.take_verified(rows, [True, False, None]) == [True, False, True]
    assert [ItemJudgement.reward(QUERY, row) for row in rows] == [1.0, 0.0, 0.0]
    metrics = ItemJudgement.metrics([QUERY] * 3, [None] * 3, rows)
    assert metrics["judge/verifier_agreement"] == 2 / 3
    plain = Query("r", QUERY.messages, QUERY.rubric)
    assert "judge/verifier_agreement" not in ItemJudgement.metrics([plain], [None], rows[:1])


def test_a_part_travels_to_a_judge_on_ranks_of_its_own():
    part = Part([QUERY], 2, [[1], [2]], ["a", "b"], 0.5, [True, None])
    assert Part.from_plain(part.plain()) == part


def test_a_reward_models_score_has_only_its_credit():
    """The verdict is the reward; the score agrees where right responses are above their group's mean and wrong ones are not."""
    rows = [[ScoreJudgement(score)] for score in (3.0, -1.0, 2.0, 0.0)]
    assert ScoreJudgement.take_verified(rows, [True, False, False, True]) == [True, True, False, False]
    assert [ScoreJudgement.reward(QUERY, row) for row in rows] == [1.0, 0.0, 0.0, 1.0]
    assert [ScoreJudgement.token_rewards(QUERY, row, [None], 2).tolist() for row in rows[:2]] == [[0.5, 1.5], [0, 0]]
    other = Query("r", QUERY.messages, QUERY.rubric)
    alone = [[ScoreJudgement(7.0)]]
    assert ScoreJudgement.take_verified(alone, [None]) == [True] and ScoreJudgement.reward(other, alone[0]) == 7.0
    metrics = ScoreJudgement.metrics([QUERY] * 4 + [other], [None] * 5, [*rows, *alone])
    assert metrics == {"judge/verifier_agreement": 0.5}
    assert [from_values(row[0].values()) for row in (*rows, *alone)] == [row[0] for row in (*rows, *alone)]
