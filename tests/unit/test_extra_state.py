"""What layers keep beside their weights is never saved: Transformer Engine's FP8 state, which is of delayed scaling only.

Leaves out saving itself (tests/gpu moves checkpoints of experts between plain torch and Transformer Engine layers).
"""

import pytest

from g2r_megatron.model.torch_dist import is_extra_state


@pytest.mark.parametrize(
    ("key", "extra"),
    [
        ("decoder.layers.0.self_attention.linear_qkv._extra_state", True),
        ("decoder.layers.0.mlp.experts.linear_fc1._extra_state", True),  # the first expert of a grouped product
        ("decoder.layers.0.mlp.experts.linear_fc1._extra_state7", True),  # and the eighth
        ("decoder.layers.0.mlp.experts.linear_fc1.weight7", False),
        ("decoder.layers.0.mlp.experts.linear_fc1.weight", False),
    ],
)
def test_extra_state_of_every_expert_is_known(key, extra):
    """One expert's left behind makes Megatron-Core refuse the whole save: shards of the object are missing."""
    assert is_extra_state(key) is extra
