"""The verifier's verdicts in the judge stage: they are the reward, and credit is computed only where the judge agrees.

Leaves out real judges (runs/test_verifiable_training.py) and what a verifier decides (test_verifier.py).
"""

from g2r_megatron.credit.judgements import ItemJudgement
from g2r_megatron.data.types import Query, RubricItem
from g2r_megatron.judge.parts import Part, take_verified

QUERY = Query(
    "q", ({"role": "user", "content": "1 + 1"},), (RubricItem("right", 1.0),), answer="2", dataset="verifiable"
)


def test_the_verifier_decides():
    rows = [[ItemJudgement(0.9, 0.1, True)], [ItemJudgement(0.9, 0.1, True)], [ItemJudgement(0.2, 0.7, False)]]
    assert take_verified(rows, [True, False, None]) == [True, False, True]
    assert [ItemJudgement.reward(QUERY, row) for row in rows] == [1.0, 0.0, 0.0]
    metrics = ItemJudgement.metrics([QUERY] * 3, [None] * 3, rows)
    assert metrics["judge/verifier_agreement"] == 2 / 3
    plain = Query("r", QUERY.messages, QUERY.rubric)
    assert "judge/verifier_agreement" not in ItemJudgement.metrics([plain], [None], rows[:1])


def test_a_part_travels_to_a_judge_on_ranks_of_its_own():
    part = Part([QUERY], 2, [[1], [2]], ["a", "b"], 0.5, [True, None])
    assert Part.from_plain(part.plain()) == part
