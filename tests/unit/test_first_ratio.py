"""The first ratios of a run are of the policy with itself: what is not 1 to the dtype's tolerance ends the run.

Leaves out where the ratios come from (test_parity_update.py) and what GPU kernels make of them (tests/gpu).
"""

import pytest
import torch

from g2r_megatron.errors import RunError
from g2r_megatron.policy.trainer import check_first_ratio


@pytest.mark.parametrize(
    ("dtype", "mean", "largest", "good"),
    [
        (torch.float32, 1.0, 1.0, True),
        (torch.float32, 1.0, 1.001, False),
        (torch.bfloat16, 1.0, 1.01, True),
        (torch.bfloat16, 0.97, 1.0, False),  # every ratio is too small: stale weights need not push any up
        (torch.bfloat16, 1.0, 1.3, False),
        (torch.bfloat16, float("nan"), float("nan"), True),  # a bad step, which is skipped and counted
    ],
)
def test_what_is_let_through(dtype, mean, largest, good):
    metrics = {"ratio/first": mean, "ratio/first_max": largest}
    if good:
        check_first_ratio(metrics, dtype)
        return
    with pytest.raises(RunError, match="first ratios of this run are off 1"):
        check_first_ratio(metrics, dtype)
