"""A save holds and writes this rank's share only, and the share falls with the ranks; older checkpoints are still read.

Bytes are counted, not timed: files of each rank, and the storages that a save makes at most at a time, in the background
too. Leaves out GPUs, where the copy to the host is the only one, and what the file system buffers.
"""

import weakref
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from g2r_megatron.config.options import Layout
from g2r_megatron.policy.optimizer_shards import boxes
from test_checkpoint import checkpointer_of, go_on, load_and_go_on, on, same, trainer_of, update
from tiny_models import build_tiny_hf


class Made(TorchDispatchMode):
    """Bytes of the storages that are made in the block: those alive now, and at most at a time."""

    def __init__(self):
        super().__init__()
        self.now = self.most = 0
        self._known: dict[int, weakref.finalize] = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **kwargs or {})
        for tensor in [result] if isinstance(result, torch.Tensor) else []:
            given = {t.untyped_storage().data_ptr() for t in args if isinstance(t, torch.Tensor)}
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in given | self._known.keys() and storage.nbytes():
                self.now += storage.nbytes()
                self.most = max(self.most, self.now)
                self._known[storage.data_ptr()] = weakref.finalize(
                    storage, self._gone, storage.data_ptr(), storage.nbytes()
                )
        return result

    def _gone(self, address: int, size: int) -> None:
        self.now -= size
        self._known.pop(address, None)


# In the ranks.


def measured_save(layout: Layout, path: str, directory: str, in_background: bool) -> tuple[int, int, int]:
    """(bytes of weights and optimizer state of all ranks, at most made in a save, written) by this rank."""
    trainer = trainer_of(layout, path, dtype="bf16")
    parameters = sum(p.numel() for p in trainer.model.chunks[0].parameters())
    checkpointer = checkpointer_of(trainer, directory)
    with Made() as made:
        checkpointer.begin(1, in_background)
    checkpointer.finish(wait=True)
    rank = torch.distributed.get_rank()
    files = Path(directory, "step_00000001").glob(f"__{rank}_*.distcp")
    return parameters * (2 + 12), made.most, sum(file.stat().st_size for file in files)


def save_gathered_and_go_on(layout: Layout, path: str, directory: str) -> dict:
    """A checkpoint as they were: Megatron-Core's own fully_reshardable state."""
    trainer = trainer_of(layout, path)
    update(trainer)
    with patch("g2r_megatron.policy.checkpoint.sharded_optimizer_state", gathered):
        checkpointer_of(trainer, directory).save(2)
    return go_on(trainer)


def gathered(optimizer, weights: dict, is_loading: bool, metadata: dict) -> dict:
    return optimizer.sharded_state_dict(weights, is_loading=is_loading, metadata=metadata)


# The tests.


@pytest.fixture(scope="module")
def larger(tmp_path_factory) -> str:
    """Large enough that its shards, not the files' frames, are what is counted: 1.7 million parameters."""
    sizes = dict(hidden_size=256, intermediate_size=512, num_hidden_layers=4)
    return str(build_tiny_hf("qwen3", tmp_path_factory.mktemp("larger"), **sizes))


@pytest.mark.parametrize("in_background", [False, True], ids=["waiting", "in the background"])
def test_a_rank_holds_and_writes_its_share(worlds, larger, tmp_path, in_background):
    """At most 1.3 of the whole divided by the ranks, on one, two and four data-parallel ranks."""
    for ranks in (1, 2, 4):
        reports = worlds[ranks].run(measured_save, Layout(), larger, str(tmp_path / str(ranks)), in_background)
        share = reports[0][0] / ranks
        for _, made, written in reports:
            assert 0 < written <= 1.3 * share and made <= 1.3 * share
        assert sum(written for *_, written in reports) >= reports[0][0]


@pytest.mark.parametrize("target", ["dp2", "tp2 pp2 sp"])
def test_gathered_checkpoints_are_read(worlds, tiny_hf, tmp_path, target):
    """Bit for bit on the same layout, and on another one to rounding."""
    model = str(tiny_hf("qwen2"))
    before = on(worlds, "dp2", save_gathered_and_go_on, model, str(tmp_path))[0]
    after = on(worlds, target, load_and_go_on, model, str(tmp_path), True, "fp32")[0]
    assert after["step"] == 2 and same(after["weights"], before["weights"])
    if target == "dp2":
        assert same(after["next"], before["next"])
    for name, expected in before["next"].items():
        assert after["next"][name] == pytest.approx(expected, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("shape", [(7,), (3, 4), (2, 3, 4)])
def test_boxes_cover_a_flat_range_in_order(shape):
    """Every range: joined, the boxes are the range."""
    whole = torch.arange(torch.Size(shape).numel()).view(shape)
    for start in range(whole.numel() + 1):
        for end in range(start, whole.numel() + 1):
            parts = [
                whole[tuple(slice(o, o + n) for o, n in zip(*box, strict=True))].flatten()
                for box in boxes(shape, start, end)
            ]
            assert torch.cat([torch.empty(0, dtype=torch.long), *parts]).tolist() == list(range(start, end))
