"""A checkpoint restores the policy on its own layout bitwise, on any other to rounding; a bad one is never loaded.

Weights, Adam's moments, learning rate and random states are checked through what they lead to: the next updates. Saved
on one layout and loaded on others, for tied and untied embeddings, a vocabulary that is padded, experts, virtual and
uneven stages, a plain and a sharded optimizer. Leaves out the training loop around it and kills (test_train_resume.py).
"""

import resource
import shutil
import signal
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from distributed import groups_of
from g2r_megatron.config.options import Layout, OptimizerConfig, PolicyConfig, Precision, TrainConfig
from g2r_megatron.errors import UserError
from tiny_models import build_tiny_hf

# name -> (processes, layout)
PLACES = {
    "one rank": (1, Layout()),
    "dp2": (2, Layout()),
    "tp2": (2, Layout(tp=2)),
    "pp2": (2, Layout(pp=2)),
    "tp2 sp dp2": (4, Layout(tp=2, sp=True)),
    "pp2 dp2": (4, Layout(pp=2)),
    "tp2 pp2 sp": (4, Layout(tp=2, pp=2, sp=True)),
    "tp4": (4, Layout(tp=4)),
    "pp4": (4, Layout(pp=4)),
    "pp2 uneven dp2": (4, Layout(pp=2, stage_layers=[3, 1])),
    "ep2": (2, Layout(ep=2)),
    "etp2": (2, Layout(etp=2)),
    "pp2 ep2": (4, Layout(pp=2, ep=2)),
    "tp2 sp ep2 etp2": (4, Layout(tp=2, sp=True, ep=2, etp=2)),
    "tp2 sp ep2 dp2": (4, Layout(tp=2, sp=True, ep=2)),
    "pp4 vpp2": (4, Layout(pp=4, vpp=2)),  # of 8 layers
    "pp3 vpp2": (3, Layout(pp=3, vpp=2, stage_layers=[2, 1, 1, 1, 1, 2])),
}
MINI_BATCHES = [[0, 1, 2, 3], [4, 5, 6, 7]]


# In the ranks.


def trainer_of(layout: Layout, path: str, distributed: bool = True, dtype: str = "fp32"):
    from g2r_megatron.model.build import build_model
    from g2r_megatron.model.hf import open_hf_model
    from g2r_megatron.policy.trainer import PolicyTrainer

    model = build_model("policy", open_hf_model(path, "policy.model"), groups_of(layout), Precision(dtype=dtype))
    # eps: with Adam's usual 1e-8, rounding in a gradient that is truly zero becomes a full-size step.
    optimizer = OptimizerConfig(
        lr=1e-3, decay="linear", warmup_steps=1, weight_decay=0.1, eps=1e-4, distributed=distributed
    )
    return PolicyTrainer(model, TrainConfig(policy=PolicyConfig(micro_batch_tokens=60), optimizer=optimizer, steps=6))


def checkpointer_of(trainer, directory: str, keep_last: int = 2):
    from g2r_megatron.policy.checkpoint import Checkpointer

    return Checkpointer(trainer, Path(directory), keep_last)


def update(trainer) -> dict:
    """One training step on eight made-up responses; its metrics."""
    from g2r_megatron.policy.log_probs import TokenSequence

    g = torch.Generator().manual_seed(5)

    def ids(low: int, high: int) -> list[int]:
        return torch.randint(0, 383, (int(torch.randint(low, high, (1,), generator=g)),), generator=g).tolist()

    sequences = [TokenSequence(ids(3, 12), ids(1, 15)) for _ in range(8)]
    advantages = [torch.randn(len(s.response_ids), generator=g) for s in sequences]
    return trainer.update(sequences, MINI_BATCHES, advantages, trainer.log_probs(sequences, MINI_BATCHES), None).metrics


def hf_arrays(model) -> dict:
    """The model's weights under Hugging Face's names, fp32 numpy, on rank 0; {} elsewhere."""
    from g2r_megatron.model.write_hf import iterate_hf_tensors

    tensors = iterate_hf_tensors(model)
    return {name: tensor.detach().float().numpy().copy() for name, tensor in tensors}


def go_on(trainer) -> dict:
    """What the next two training steps make of the trainer's state (the second asks the scheduler for its rate)."""
    found = {"random": torch.rand(3).tolist(), "weights": hf_arrays(trainer.model)}
    found["metrics"] = [update(trainer), update(trainer)]
    return found | {"next": hf_arrays(trainer.model)}


def save_and_go_on(layout: Layout, path: str, directory: str, distributed: bool, dtype: str) -> dict:
    trainer = trainer_of(layout, path, distributed, dtype)
    update(trainer)
    update(trainer)
    checkpointer_of(trainer, directory).save(2)
    return go_on(trainer)


def load_and_go_on(layout: Layout, path: str, directory: str, distributed: bool, dtype: str) -> dict:
    trainer = trainer_of(layout, path, distributed, dtype)
    torch.manual_seed(0)
    step = checkpointer_of(trainer, directory).load_latest()
    return {"step": step, **go_on(trainer)}


def save_steps(layout: Layout, path: str, directory: str, steps: list[int], keep_last: int) -> None:
    checkpointer = checkpointer_of(trainer_of(layout, path), directory, keep_last)
    for step in steps:
        checkpointer.save(step)


def load_step(layout: Layout, path: str, directory: str) -> int | str:
    """The step restored, or the error."""
    try:
        return checkpointer_of(trainer_of(layout, path), directory).load_latest()
    except UserError as error:
        return str(error)


def save_in_background(layout: Layout, path: str, directory: str, distributed: bool, dtype: str) -> list:
    """As ``save_and_go_on``, but two saves are written while the weights change; what ``finish`` and ``begin`` told."""
    trainer = trainer_of(layout, path, distributed, dtype)
    update(trainer)
    update(trainer)
    checkpointer = checkpointer_of(trainer, directory)
    told = [checkpointer.finish(wait=True), checkpointer.begin(2)]
    update(trainer)
    told.append(checkpointer.begin(3))  # waits for the one before
    update(trainer)
    told += [checkpointer.finish(wait=True), checkpointer.finish(wait=False)]
    return told


def load_after_damage(layout: Layout, path: str, directory: str) -> tuple:
    """(the step restored, what was left out)"""
    checkpointer = checkpointer_of(trainer_of(layout, path), directory)
    return checkpointer.load_latest(), checkpointer.damaged


def resume_and_save(layout: Layout, path: str, directory: str, steps: list[int], keep_last: int) -> int:
    checkpointer = checkpointer_of(trainer_of(layout, path), directory, keep_last)
    start = checkpointer.load_latest()
    for step in steps:
        checkpointer.save(step)
    return start


def save_error(layout: Layout, path: str, directory: str, in_background: bool) -> str:
    checkpointer = checkpointer_of(trainer_of(layout, path), directory)
    try:
        checkpointer.begin(2, in_background)
        checkpointer.finish(wait=True)
    except UserError as error:
        return str(error)
    return "saved"


def save_without_room(layout: Layout, path: str, directory: str, bytes_a_file: int, in_background: bool) -> str:
    """The error of a save that may not write files of more than ``bytes_a_file``."""
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # the write fails with EFBIG, as it would for a full disk
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (bytes_a_file, limits[1]))
    try:
        return save_error(layout, path, directory, in_background)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)


# The tests.


def on(worlds, place: str, function, *args) -> list:
    size, layout = PLACES[place]
    return worlds[size].run(function, layout, *args)


@pytest.fixture(scope="module")
def model_directory(tiny_hf, tmp_path_factory):
    """``model_directory(family)``: of 4 layers, or of 8 with "_8" after the family's name."""
    long: dict[str, Path] = {}

    def get(family: str) -> str:
        if not family.endswith("_8"):
            return str(tiny_hf(family))
        if family not in long:
            path = tmp_path_factory.mktemp(family)
            long[family] = build_tiny_hf(family.removesuffix("_8"), path, num_hidden_layers=8)
        return str(long[family])

    return get


def relative(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def same(found: dict, expected: dict) -> bool:
    return found.keys() == expected.keys() and all(np.array_equal(found[n], expected[n]) for n in expected)


@pytest.mark.parametrize(
    ("family", "distributed", "source", "targets"),
    [
        ("qwen2", True, "dp2", ["dp2", "one rank", "tp2 pp2 sp", "pp4"]),
        ("qwen2", False, "tp2 sp dp2", ["tp2 sp dp2", "dp2", "tp4"]),
        ("llama3", True, "tp2 sp dp2", ["tp2 sp dp2", "pp2 dp2"]),
        ("llama3", False, "pp2", ["pp2", "tp2"]),
        ("qwen3", True, "pp2", ["pp2", "tp2"]),
        ("qwen3", False, "one rank", ["one rank", "tp2 pp2 sp"]),
        ("mistral", True, "pp2 uneven dp2", ["pp2 uneven dp2", "tp2"]),
        ("qwen3_moe", True, "pp2 ep2", ["pp2 ep2", "tp2 sp ep2 etp2", "one rank"]),
        ("qwen3_moe", False, "ep2", ["ep2", "etp2", "tp2 pp2 sp"]),
        ("mixtral", True, "tp2 sp ep2 dp2", ["tp2 sp ep2 dp2", "etp2"]),
        ("qwen2_8", True, "pp4 vpp2", ["pp4 vpp2", "pp3 vpp2"]),
        ("qwen3_moe_8", False, "pp3 vpp2", ["pp3 vpp2", "ep2"]),
    ],
)
def test_a_checkpoint_goes_on_anywhere(worlds, model_directory, tmp_path, family, distributed, source, targets):
    common = (model_directory(family), str(tmp_path), distributed, "fp32")
    before = on(worlds, source, save_and_go_on, *common)
    weights, following = before[0]["weights"], before[0]["next"]
    stride = np.sqrt(sum(np.linalg.norm(following[n] - weights[n]) ** 2 for n in weights))
    assert stride > 0.01  # an update that shows
    worst, worst_stride = 0.0, 0.0
    for target in targets:
        after = on(worlds, target, load_and_go_on, *common)
        assert [reply["step"] for reply in after] == [2] * len(after)
        assert same(after[0]["weights"], weights), target
        assert [m["optimizer/lr"] for m in after[0]["metrics"]] == [m["optimizer/lr"] for m in before[0]["metrics"]]
        if target == source:
            assert [r["random"] for r in after] == [r["random"] for r in before]
            assert same(after[0]["next"], following) and after[0]["metrics"] == before[0]["metrics"]
            continue
        now = after[0]["next"]
        worst = max(worst, *(relative(now[n], following[n]) for n in following))
        error = np.sqrt(sum(np.linalg.norm(now[n] - following[n]) ** 2 for n in following))
        worst_stride = max(worst_stride, error / stride)
    print(f"{family} {source}: worst weight {worst:.1e}, worst step {worst_stride:.1e}")
    assert worst < 1e-6 and worst_stride < 1e-5


@pytest.mark.parametrize("place", ["one rank", "tp2 sp dp2"])
def test_bf16_goes_on_bitwise_with_its_fp32_main_weights(worlds, tiny_hf, tmp_path, place):
    """The main weights are in the optimizer's state: rounded bf16 ones would lead to another next step."""
    common = (str(tiny_hf("qwen2")), str(tmp_path), True, "bf16")
    before, after = on(worlds, place, save_and_go_on, *common), on(worlds, place, load_and_go_on, *common)
    assert not same(before[0]["weights"], before[0]["next"])
    assert same(after[0]["weights"], before[0]["weights"]) and same(after[0]["next"], before[0]["next"])
    assert after[0]["metrics"] == before[0]["metrics"]


def test_the_last_n_are_kept_and_an_interrupted_save_is_removed(worlds, tiny_hf, tmp_path):
    run = partial(on, worlds, "dp2")
    model, directory = str(tiny_hf("qwen2")), tmp_path / "checkpoints"
    assert run(load_step, model, str(directory)) == [0, 0]  # not even the directory is there
    run(save_steps, model, str(directory), [1, 2, 10, 11], 2)
    assert sorted(p.name for p in directory.iterdir()) == ["step_00000010", "step_00000011"]
    # killed while saving step 12: files, but no name of a checkpoint
    interrupted = directory / "step_00000012.incomplete"
    shutil.copytree(directory / "step_00000011", interrupted)
    (interrupted / "__0_0.distcp").write_bytes(b"torn")
    assert run(load_step, model, str(directory)) == [11, 11]
    assert not interrupted.exists()
    interrupted.mkdir()  # or before the first file, and saved again without a restart
    run(save_steps, model, str(directory), [12], 1)
    assert [p.name for p in directory.iterdir()] == ["step_00000012"]
    assert run(load_step, model, str(directory)) == [12, 12]


@pytest.mark.parametrize("in_background", [False, True], ids=["waiting", "in the background"])
@pytest.mark.parametrize(("place", "room"), [("one rank", 50_000), ("dp2", 50_000), ("dp2", 100)])
def test_a_full_disk_is_one_line_and_the_checkpoint_before_is_intact(
    worlds, tiny_hf, tmp_path, place, room, in_background
):
    """Full from the first file on (room 100), or in the middle."""
    model = str(tiny_hf("qwen2"))
    on(worlds, place, save_steps, model, str(tmp_path), [1], 1)
    errors = on(worlds, place, save_without_room, model, str(tmp_path), room, in_background)
    for error in errors:
        assert "step_00000002" in error and "cannot be written (" in error and "\n" not in error
        assert "File too large" in error
    assert set(on(worlds, place, load_step, model, str(tmp_path))) == {1}


def test_a_directory_that_cannot_be_made_is_one_line(worlds, tiny_hf, tmp_path):
    """A file in its place, for every rank: permissions say nothing to root."""
    (tmp_path / "checkpoints").write_text("a file")
    errors = on(worlds, "dp2", save_error, str(tiny_hf("qwen2")), str(tmp_path / "checkpoints"), False)
    for error in errors:
        assert f"{tmp_path}/checkpoints/step_00000002: cannot be written (" in error and "Not a directory" in error
    assert (tmp_path / "checkpoints").read_text() == "a file"


def test_a_directory_that_is_gone_is_made_again(worlds, tiny_hf, tmp_path):
    model, directory = str(tiny_hf("qwen2")), tmp_path / "a" / "checkpoints"
    assert set(on(worlds, "dp2", save_error, model, str(directory), True)) == {"saved"}
    assert [path.name for path in directory.iterdir()] == ["step_00000002"]


@pytest.mark.parametrize(
    ("place", "distributed", "dtype"),
    [("one rank", False, "fp32"), ("one rank", True, "bf16"), ("dp2", True, "fp32"), ("tp2 sp dp2", True, "bf16")],
)
def test_what_is_written_in_the_background_is_the_state_of_its_step(
    worlds, tiny_hf, tmp_path, place, distributed, dtype
):
    """The weights change while it is written: the next updates from it are those from a save that was waited for."""
    model = str(tiny_hf("qwen3"))
    told = on(worlds, place, save_in_background, model, str(tmp_path / "b"), distributed, dtype)
    assert all(t == [None, None, 2, 3, None] for t in told)
    on(worlds, place, save_and_go_on, model, str(tmp_path / "a"), distributed, dtype)
    names = sorted(path.name for path in (tmp_path / "a" / "step_00000002").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "b" / "step_00000002").iterdir())
    shutil.rmtree(tmp_path / "b" / "step_00000003")
    waited, background = (
        on(worlds, place, load_and_go_on, model, str(tmp_path / d), distributed, dtype) for d in ("a", "b")
    )
    for one, other in zip(waited, background, strict=True):
        assert one["step"] == other["step"] == 2 and one["metrics"] == other["metrics"]
        assert same(one["weights"], other["weights"]) and same(one["next"], other["next"])


def emptied(path: Path) -> None:
    path.write_bytes(b"")


def halved(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flipped(path: Path) -> None:
    """One bit, in the middle."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def garbled(path: Path) -> None:
    path.write_bytes(bytes(byte ^ 0x5A for byte in path.read_bytes()))


@pytest.fixture(scope="module")
def whole_checkpoint(worlds, tiny_hf, tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("whole")
    on(worlds, "one rank", save_steps, str(tiny_hf("qwen2")), str(directory), [3], 1)
    return directory


@pytest.mark.parametrize("damage", [Path.unlink, emptied, halved, flipped, garbled], ids=lambda damage: damage.__name__)
@pytest.mark.parametrize(
    "file", ["g2r.json", "metadata.json", "common.pt", ".metadata", "__0_0.distcp", "hf/config.json"]
)
def test_a_damaged_checkpoint_is_one_line_that_names_it(worlds, tiny_hf, tmp_path, whole_checkpoint, file, damage):
    directory = tmp_path / "checkpoints"
    shutil.copytree(whole_checkpoint, directory)
    damage(directory / "step_00000003" / file)
    (error,) = on(worlds, "one rank", load_step, str(tiny_hf("qwen2")), str(directory))
    assert isinstance(error, str) and "\n" not in error and len(error) < 400
    assert f"{directory}/step_00000003: cannot be loaded (" in error and "no other one is whole" in error
    assert file in error


def test_every_rank_finds_the_damage_of_one_file(worlds, tiny_hf, tmp_path):
    """Whosever file it is: otherwise the others would wait for that rank."""
    model = str(tiny_hf("qwen2"))
    on(worlds, "tp2", save_steps, model, str(tmp_path), [3], 1)
    halved(tmp_path / "step_00000003" / "__1_0.distcp")
    for error in on(worlds, "tp2", load_step, model, str(tmp_path)):
        assert "__1_0.distcp has" in error


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_is_used(worlds, tiny_hf, tmp_path):
    """Nothing is deleted or overwritten; the step that is made again gets its name, what stood there is set aside."""
    model = str(tiny_hf("qwen2"))
    on(worlds, "dp2", save_steps, model, str(tmp_path), [1, 2, 3], 3)
    damage = {2: "__1_0.distcp", 3: "__0_0.distcp"}
    for step, file in damage.items():
        flipped(tmp_path / f"step_0000000{step}" / file)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for start, left_out in on(worlds, "dp2", load_after_damage, model, str(tmp_path)):
        assert start == 1
        for (where, problem), step in zip(left_out, (3, 2), strict=True):
            assert where == f"checkpoint {tmp_path}/step_0000000{step}" and damage[step] in problem
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    # keep_last 1 deletes neither the checkpoint just made nor the newer ones, which are evidence
    assert on(worlds, "dp2", resume_and_save, model, str(tmp_path), [2], 1) == [1, 1]
    names = ["step_00000002", "step_00000002.damaged", "step_00000003"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    assert (tmp_path / "step_00000002.damaged" / damage[2]).read_bytes() == before[tmp_path / names[0] / damage[2]]
    assert on(worlds, "dp2", resume_and_save, model, str(tmp_path), [3], 2) == [2, 2]
    assert sorted(path.name for path in tmp_path.iterdir()) == [*names, "step_00000003.damaged"]
    assert on(worlds, "dp2", load_after_damage, model, str(tmp_path)) == [(3, [])] * 2
