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
from g2r_megatron.config import Layout, OptimizerConfig, PolicyConfig, Precision, TrainConfig
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
    return trainer.update(sequences, MINI_BATCHES, advantages, trainer.log_probs(sequences, MINI_BATCHES), None)


def hf_arrays(model) -> dict:
    """The model's weights under Hugging Face's names, fp32 numpy, on rank 0; {} elsewhere."""
    from g2r_megatron.model.export import iterate_hf_tensors

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


def save_without_room(layout: Layout, path: str, directory: str, bytes_a_file: int) -> str:
    """The error of a save that may not write files of more than ``bytes_a_file``."""
    checkpointer = checkpointer_of(trainer_of(layout, path), directory)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # the write fails with EFBIG, as it would for a full disk
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (bytes_a_file, limits[1]))
    try:
        checkpointer.save(2)
    except UserError as error:
        return str(error)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)
    return "saved"


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
        ("qwen2", False, "tp2 sp dp2", ["tp2 sp dp2", "dp2", "pp2 dp2", "tp4"]),
        ("llama3", True, "tp2 sp dp2", ["tp2 sp dp2", "pp2 dp2", "tp4"]),
        ("llama3", False, "pp2", ["pp2", "tp2"]),
        ("qwen3", True, "pp2", ["pp2", "tp2", "tp2 sp dp2"]),
        ("qwen3", False, "one rank", ["one rank", "tp2 pp2 sp"]),
        ("mistral", True, "pp2 uneven dp2", ["pp2 uneven dp2", "tp2"]),
        ("qwen3_moe", True, "pp2 ep2", ["pp2 ep2", "tp2 sp ep2 etp2", "one rank"]),
        ("qwen3_moe", False, "ep2", ["ep2", "etp2", "tp2 pp2 sp"]),
        ("mixtral", True, "tp2 sp ep2 dp2", ["tp2 sp ep2 dp2", "etp2"]),
        ("qwen2_8", True, "pp4 vpp2", ["pp4 vpp2", "pp3 vpp2", "tp2 pp2 sp"]),
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


@pytest.mark.parametrize("place", ["one rank", "dp2"])
def test_a_full_disk_is_one_line_and_the_checkpoint_before_is_intact(worlds, tiny_hf, tmp_path, place):
    model = str(tiny_hf("qwen2"))
    on(worlds, place, save_steps, model, str(tmp_path), [1], 1)
    errors = on(worlds, place, save_without_room, model, str(tmp_path), 50_000)
    for error in errors:
        assert "step_00000002: cannot be written (" in error and "\n" not in error
    assert set(on(worlds, place, load_step, model, str(tmp_path))) == {1}


def emptied(path: Path) -> None:
    path.write_bytes(b"")


def halved(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def garbled(path: Path) -> None:
    path.write_bytes(bytes(byte ^ 0x5A for byte in path.read_bytes()))


@pytest.fixture(scope="module")
def whole_checkpoint(worlds, tiny_hf, tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("whole")
    on(worlds, "one rank", save_steps, str(tiny_hf("qwen2")), str(directory), [3], 1)
    return directory


@pytest.mark.parametrize("damage", [Path.unlink, emptied, halved, garbled], ids=lambda damage: damage.__name__)
@pytest.mark.parametrize("file", ["g2r.json", "metadata.json", "common.pt", ".metadata", "__0_0.distcp"])
def test_a_damaged_checkpoint_is_one_line_that_names_it(worlds, tiny_hf, tmp_path, whole_checkpoint, file, damage):
    directory = tmp_path / "checkpoints"
    shutil.copytree(whole_checkpoint, directory)
    damage(directory / "step_00000003" / file)
    (error,) = on(worlds, "one rank", load_step, str(tiny_hf("qwen2")), str(directory))
    assert isinstance(error, str) and "\n" not in error and len(error) < 400
    assert f"{directory}/step_00000003: cannot be loaded (" in error and "delete it" in error
    if damage is not garbled:
        assert f"({file}" in error


def test_every_rank_finds_the_damage_of_one_file(worlds, tiny_hf, tmp_path):
    """Whosever file it is: otherwise the others would wait for that rank."""
    model = str(tiny_hf("qwen2"))
    on(worlds, "tp2", save_steps, model, str(tmp_path), [3], 1)
    halved(tmp_path / "step_00000003" / "__1_0.distcp")
    for error in on(worlds, "tp2", load_step, model, str(tmp_path)):
        assert "__1_0.distcp has" in error
