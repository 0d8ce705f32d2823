"""Faithfulness of credit as plain numbers: of one pair, and the running mean that goes on from its own metrics.

Leaves out hiding itself (test_hiding.py) and that training measures it (test_own_ranks.py compares its metrics).
"""

import pytest

from g2r_megatron.credit.faithfulness import (
    CREDIT,
    PAIRS,
    WINDOW,
    Faithful,
    RunningFaithfulness,
    faithfulness_metrics,
)

LOST = [0.1, 3.0, -0.4, 1.2, 0.7]


def test_credit_in_the_order_of_the_losses_is_faithful_and_its_placebo_is_not():
    pair = Faithful.of([1.0, 9.0, -2.0, 5.0, 4.0], LOST, "a")
    assert pair.credit == pytest.approx(1.0) and abs(pair.shuffled) < 0.5
    assert pair == Faithful.of([1.0, 9.0, -2.0, 5.0, 4.0], LOST, "a")
    assert Faithful.of([-loss for loss in LOST], LOST, "a").credit == pytest.approx(-1.0)
    assert Faithful.of([1.0, float("nan"), 2.0, 3.0, 4.0], LOST, "a") == Faithful(0.0, 0.0)


def test_the_running_mean_goes_on_from_its_metrics():
    """A mean over all pairs up to the window, then with less and less of old ones; a resumed run gives the same bits."""
    steps = [faithfulness_metrics([Faithful(0.1 * n, 0.01 * n)] * 4) for n in range(20)]
    whole = RunningFaithfulness({})
    found = [whole.add(metrics) for metrics in steps]
    assert found[4][CREDIT] == pytest.approx(0.2) and found[4][PAIRS] == 20
    assert found[-1][PAIRS] == 80 > WINDOW and 1.0 < found[-1][CREDIT] < 1.9
    resumed = RunningFaithfulness(found[9])
    assert [resumed.add(metrics) for metrics in steps[10:]] == found[10:]
    assert whole.add({"time/attribution": 1.0}) == {"time/attribution": 1.0} and faithfulness_metrics([]) == {}
