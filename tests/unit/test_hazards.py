"""The hazard metrics and the programmatic truth, on cases small enough to count by hand.

Leaves out where the numbers are written (records) and drawn (report).
"""

import math

import pytest
import torch

from g2r_megatron.credit.hazards import (
    advantage_metrics,
    attribution_metrics,
    judge_metrics,
    key_token_metrics,
    response_metrics,
    reward_metrics,
)
from g2r_megatron.credit.truth import key_token_mask, true_reward, true_verdicts
from g2r_megatron.data.types import Query, RubricItem

RUBRIC = (
    RubricItem("rests", 3.0, check=r"\b(rest)\b"),
    RubricItem("drinks", 1.0, check="water"),
    RubricItem("alarms", -2.0, check="panic"),
)


def query(*rubric: RubricItem) -> Query:
    return Query("q", ({"role": "user", "content": "?"},), rubric)


def test_truth_comes_from_the_checks():
    """An item is truly met when its check matches; the true score uses the rubric's own formula."""
    assert true_verdicts(query(*RUBRIC), "rest, do not panic") == [True, False, True]
    assert true_reward(query(*RUBRIC), "rest, do not panic") == pytest.approx(1 / 4)
    assert true_reward(query(*RUBRIC), "") == 0.0


def test_truth_is_unknown_without_a_check_on_every_item():
    """A rubric checked in part has no true score: a partial one would be compared with a full one."""
    partly = query(*RUBRIC, RubricItem("kind", 1.0))
    assert true_verdicts(partly, "rest") is None and true_reward(partly, "rest") is None


@pytest.mark.parametrize(
    ("check", "expected"),
    [
        (r"take (\w+) for (\w+)", [0, 1, 1, 0, 1]),  # the groups, also when a token holds more than the group
        (r"for fever", [0, 0, 0, 1, 1]),  # no group: the whole match
        (r"(never)|for", [0, 0, 0, 1, 0]),  # no group took part: the whole match
        (r"rest", [0, 0, 0, 0, 0]),
    ],
)
def test_key_tokens_overlap_the_key_characters(check, expected):
    """A token is a key token when it shares a character with a group of the match."""
    mask = key_token_mask(check, ["take", " para", "cetamol", " for", " fever"])
    assert mask.int().tolist() == expected


def test_key_tokens_of_nothing():
    """No tokens, or a check that matches the empty string, have no key tokens."""
    assert key_token_mask("a", []).shape == (0,)
    assert not key_token_mask("^", ["a"]).any()


def test_reward_metrics():
    """Mean and population std over all responses; a group of equal rewards counts as zero variance."""
    metrics = reward_metrics([[0.0, 1.0], [0.1 + 0.2, 0.3]])
    assert metrics["reward/mean"] == pytest.approx(0.4)
    assert metrics["reward/std"] == pytest.approx(math.sqrt((0.16 + 0.36 + 0.01 + 0.01) / 4))
    assert metrics["group/zero_variance_share"] == 0.5


def test_judge_metrics_compare_only_where_a_truth_is_known():
    """Agreement by item, gap = judged minus true score; without any truth only the share of True is left."""
    weights = [[1.0, 1.0], [2.0, -2.0], [1.0]]
    verdicts, truths = [[True, False], [True, True], [True]], [[True, True], [True, False], None]
    metrics = judge_metrics(verdicts, truths, weights)
    assert metrics["judge/true_share"] == pytest.approx(4 / 5)
    assert metrics["judge/agreement"] == pytest.approx(2 / 4)
    assert metrics["judge/gap"] == pytest.approx(((0.5 - 1.0) + (0.0 - 1.0)) / 2)
    assert metrics["reward/true_mean"] == pytest.approx(1.0)
    assert set(judge_metrics(verdicts, [None] * 3, weights)) == {"judge/true_share"}


def test_attribution_metrics():
    """ESS/T, flat share, max alpha over passes of 2 tokens or more; bad b are counted, never averaged away."""
    flat, hot = torch.full((4,), 0.25), torch.tensor([1.0, 0.0, 0.0, 0.0])
    raw = [torch.ones(4), torch.zeros(4), torch.tensor([1.0, math.nan]), torch.tensor([math.inf]), torch.zeros(0)]
    metrics = attribution_metrics(raw, [flat, hot, torch.ones(1)], [0.1, math.nan, 0.3, 0.2], 0.95)
    assert metrics == pytest.approx(
        {
            "attribution/passes": 5.0,
            "attribution/zero_or_nonfinite": 3.0,
            "attribution/cos_median": 0.2,
            "attribution/ess_share": (1 + 0.25) / 2,
            "attribution/flat_share": 0.5,
            "attribution/max_alpha": (0.25 + 1) / 2,
            "attribution/one_token_share": 0.5,
        }
    )


def test_attribution_metrics_without_a_pass():
    """A step without backward passes says so instead of inventing a mean."""
    assert attribution_metrics([], [], [], 0.95) == {"attribution/passes": 0.0, "attribution/zero_or_nonfinite": 0.0}


def test_key_token_mass_and_its_chance():
    """Mass of alpha on key tokens beside what uniform alpha would have there; pairs without key tokens are left out."""
    alphas = [torch.tensor([0.7, 0.2, 0.1, 0.0]), torch.tensor([0.5, 0.5])]
    masks = [torch.tensor([True, True, False, False]), torch.tensor([False, False])]
    metrics = key_token_metrics(alphas, masks)
    assert metrics == pytest.approx({"attribution/key_token_mass": 0.9, "attribution/key_token_chance": 0.5})
    assert key_token_metrics(alphas[1:], masks[1:]) == {}


def test_advantage_by_position():
    """Body tokens fall in tenths of their own response; the stop token is apart; empty tenths are left out."""
    ramp = torch.cat([torch.arange(20.0), torch.tensor([-7.0])])
    metrics = advantage_metrics([ramp, torch.tensor([3.0, 5.0])], [True, False])
    assert metrics["advantage/position_0"] == pytest.approx((0 + 1 + 3) / 3)
    assert metrics["advantage/position_5"] == pytest.approx((10 + 11 + 5) / 3)
    assert metrics["advantage/position_9"] == pytest.approx(18.5)
    assert metrics["advantage/stop_token"] == -7.0
    assert set(advantage_metrics([torch.tensor([1.0])], [True])) == {"advantage/stop_token"}
    assert set(advantage_metrics([torch.tensor([1.0])], [False])) == {"advantage/position_0"}


def test_response_metrics():
    """Mean length in tokens and the share that stopped by itself."""
    metrics = response_metrics([4, 8], [True, False])
    assert metrics == {"response/length_mean": 6.0, "response/finished_share": 0.5}
