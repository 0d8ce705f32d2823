"""A judge on ranks of its own, or with its weights in host memory, trains exactly as one that shares the policy's ranks.

Real runs of ``g2r train`` of two steps, equal bit for bit in fp32: the exported weights, metrics (times left out) and the
samples with their verdicts, alphas, token rewards and advantages. Then: resuming, errors on either side reaching the other,
the judge at work while the policy samples, and weights off the device while it does. Leaves out NCCL and page-locked
memory (there is no GPU), several nodes, torchrun (test_alarms_in_training.py), and which layouts agree with which to rounding
(test_train_loop.py).
"""

import json
import os
import shutil
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from g2r_megatron.cli import main
from g2r_megatron.credit.faithfulness import CREDIT, PAIRS, Faithful
from g2r_megatron.credit.judgements import ItemJudgement
from g2r_megatron.data.types import Query, RubricItem
from g2r_megatron.errors import UserError
from g2r_megatron.judge.parts import Judged, Part
from g2r_megatron.parallel.sides import packed, unpacked
from tiny_models import build_tiny_hf

TASK = Path(__file__).parents[2] / "examples" / "quickstart"
PARTS = 2
PATIENCE = 600.0  # seconds for anything to happen on a busy machine


# In the ranks.


def train_here(arguments: list[str]) -> str:
    """``g2r train`` in this process; the error, or an empty string."""
    from g2r_megatron.cli import train_command

    try:
        train_command(arguments)
    except UserError as error:
        return str(error)
    return ""


def train_in_order(arguments: list[str], events: Path) -> list[str]:
    """``g2r train`` where the policy does not begin to sample a part before the judge has finished the one before.

    Returns what this rank did, in order. Nothing is asked for before all parts of a step are sampled, so this can only end
    if the judge takes each part as soon as it is there.
    """
    import torch.distributed as dist

    from g2r_megatron.judge import own_ranks
    from g2r_megatron.rollout.megatron import MegatronRolloutEngine

    generate, judge_part, done = MegatronRolloutEngine.generate, own_ranks.judge_part, []

    def patient_generate(self, *args, **options):
        judged, deadline = events / f"judged {len(done)}", time.monotonic() + PATIENCE / 2
        while done and not judged.exists():
            assert time.monotonic() < deadline, f"no {judged.name} while part {len(done) + 1} was to be sampled"
            time.sleep(0.01)
        responses = generate(self, *args, **options)
        done.append(f"sampled {len(done) + 1}")
        return responses

    def noted_judge_part(*args):
        judged = judge_part(*args)
        done.append(f"judged {len(done) + 1}")
        if dist.get_rank() == 0:
            (events / done[-1]).touch()
        return judged

    MegatronRolloutEngine.generate, own_ranks.judge_part = patient_generate, noted_judge_part
    try:
        assert train_here(arguments) == ""
    finally:
        MegatronRolloutEngine.generate, own_ranks.judge_part = generate, judge_part
    return done


def train_with_offload(arguments: list[str]) -> dict:
    """``g2r train``; bytes that the judge's weights have on the device when the policy samples or updates, or they work."""
    from g2r_megatron import launch as loop

    found, build = {"idle": set(), "judging": set()}, loop.build_workers

    def spied_workers(*args):
        workers = build(*args)
        pairs = [(workers.engine, "generate"), (workers.trainer, "gradients"), (workers.judge.stage, "verdicts")]
        model = workers.judge.stage.judge.model
        for owner, name in pairs:
            state = "judging" if name == "verdicts" else "idle"
            original = getattr(owner, name)

            def spy(*args, original=original, state=state, **options):
                found[state].add(device_bytes(model))
                return original(*args, **options)

            setattr(owner, name, spy)
        found["mine"] = workers.host_weights.nbytes
        with pytest.raises(RuntimeError):  # weights that are not there are never taken for zeros
            model.chunks[0].embedding(torch.zeros(1, 1, dtype=torch.int64), position_ids=None)
        return workers

    loop.build_workers = spied_workers
    try:
        assert train_here(arguments) == ""
    finally:
        loop.build_workers = build
    return found


def device_bytes(model) -> int:
    return sum(p.untyped_storage().nbytes() for chunk in model.chunks for p in chunk.parameters())


def resident_after(model: str) -> tuple[int, list[int]]:
    """Bytes of a model's weights, and memory in use with them on the device and away, twice."""
    from g2r_megatron.config.options import Layout, Precision
    from g2r_megatron.model.build import build_model
    from g2r_megatron.model.hf import open_hf_model
    from g2r_megatron.model.offload import HostWeights
    from g2r_megatron.parallel.groups import build_groups, initialize

    initialize(seed=1)
    built = build_model("judge", open_hf_model(model, "judge.model"), build_groups("judge", Layout()), Precision())
    before = [p.detach().clone() for p in built.chunks[0].parameters()]
    weights, resident = HostWeights(built), []
    for _ in range(2):
        weights.load()
        assert all(torch.equal(p, b) for p, b in zip(built.chunks[0].parameters(), before, strict=True))
        resident.append(memory_in_use())
        weights.release()
        resident.append(memory_in_use())
    return weights.nbytes, resident


def memory_in_use() -> int:
    """Bytes of the GPU, or of this process without one."""
    if torch.cuda.is_available():
        return torch.cuda.memory_allocated()
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def large_model(directory: Path) -> str:
    return str(build_tiny_hf("qwen2", directory, vocab_size=20000, hidden_size=1024, num_hidden_layers=1))


def assert_given_back(weights: int, resident: list[int]) -> None:
    """At least the one large tensor, for malloc keeps small blocks."""
    embeddings, (on, off, on_again, off_again) = 4 * 20000 * 1024, resident
    for there, away in ((on, off), (on_again, off_again), (on_again, off)):
        assert 0.99 * embeddings < there - away < 1.01 * weights


# The runs.


def layouts(**sizes: dict) -> list[str]:
    return [f"--{model}.layout.{size}={value}" for model, chosen in sizes.items() for size, value in chosen.items()]


@pytest.fixture(scope="module")
def task(tmp_path_factory) -> list[str]:
    """Two steps of three prompts (so parts differ in size), self-judging, with a KL reference."""
    data = tmp_path_factory.mktemp("data")
    for name, count in (("train", 6), ("eval", 3)):
        lines = (TASK / "data" / f"{name}.jsonl").read_text().splitlines(keepends=True)
        (data / f"{name}.jsonl").write_text("".join(lines[:count]))
    return [
        *("--config", str(TASK / "config.yaml"), "--policy.model", str(TASK / "model")),
        *("--data.train", f'["{data}/train.jsonl"]', "--eval.data", f'["{data}/eval.jsonl"]'),
        *("--steps", "2", "--eval.every", "0", "--log.tensorboard", "false", "--log.samples_every", "1"),
        *("--rollout.prompts_per_step", "3", "--rollout.responses_per_prompt", "4", "--grpo.mix_anneal", "0"),
        *("--rollout.max_response_tokens", "24", "--judge.parts", str(PARTS)),
        *("--checkpoint.save_every", "1", "--checkpoint.keep_last", "2"),
    ]


@pytest.fixture(scope="module")
def moe_task(task, tiny_hf, tmp_path_factory) -> list[str]:
    """A random dense policy with a random judge that has experts, and verdicts that are sampled."""
    data = tmp_path_factory.mktemp("moe_task") / "train.jsonl"
    rubric = [{"criterion": "mentions water", "weight": 2}, {"criterion": "is kind", "weight": 1}]
    prompts = ["What helps against fever?", "What helps against a rash?"]
    data.write_text("".join(json.dumps({"id": p, "prompt": p, "rubric": rubric}) + "\n" for p in prompts))
    return [
        *("--policy.model", str(tiny_hf("llama3")), "--judge.model", str(tiny_hf("qwen3_moe"))),
        *("--data.train", f'["{data}"]', "--steps", "2", "--judge.verdict", "sample", "--judge.credit", "per_response"),
        *("--rollout.prompts_per_step", "2", "--rollout.responses_per_prompt", "4", "--optimizer.lr", "1e-4"),
        *("--rollout.max_response_tokens", "8", "--judge.template", "{conversation} {response} {criterion}"),
        *("--log.tensorboard", "false", "--log.samples_every", "1", "--grpo.mix_anneal", "0", "--judge.parts", "2"),
    ]


def records(run: Path, name: str) -> list[dict]:
    """The lines of a file of the run without the times."""
    lines = [json.loads(line) for line in (run / name).read_text().splitlines()]
    return [{key: value for key, value in line.items() if not key.startswith("time/")} for line in lines]


def assert_same_run(run: Path, reference: Path) -> None:
    assert records(run, "metrics.jsonl") == records(reference, "metrics.jsonl")
    samples = records(run, "samples.jsonl")
    assert samples == records(reference, "samples.jsonl")
    assert any(item["alpha"] for sample in samples for item in sample["items"])  # there was something to compare
    assert (run / "hf" / "model.safetensors").read_bytes() == (reference / "hf" / "model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def shared_tp2(worlds, task, tmp_path_factory) -> Path:
    """Policy and judge on the same two ranks, tensor parallel."""
    run = tmp_path_factory.mktemp("shared_tp2") / "run"
    both = layouts(policy={"tp": 2}, judge={"tp": 2})
    assert worlds[2].run(train_here, [*task, *both, "--output_dir", str(run)]) == ["", ""]
    return run


@pytest.fixture(scope="module")
def own_tp2(worlds, task, tmp_path_factory) -> Path:
    """The same, with two ranks for each."""
    run = tmp_path_factory.mktemp("own_tp2") / "run"
    both = layouts(policy={"tp": 2}, judge={"tp": 2})
    arguments = [*task, *both, "--judge.ranks", "2", "--output_dir", str(run)]
    assert worlds[4, 2].run(train_here, arguments) == [""] * 4
    return run


def test_a_tensor_parallel_judge(shared_tp2, own_tp2):
    """With its KL reference: on shared ranks the judge itself, on own ranks a copy that the policy's ranks hold."""
    assert_same_run(own_tp2, shared_tp2)
    times = [set(json.loads(line)) for line in (own_tp2 / "metrics.jsonl").read_text().splitlines()]
    assert all({"time/judge_wait", "time/judge_busy_share", "time/attribution"} <= keys for keys in times[1:])
    assert not any("judge_wait" in key for line in records(shared_tp2, "metrics.jsonl") for key in line)
    measured = [line[PAIRS] for line in records(own_tp2, "metrics.jsonl") if PAIRS in line]
    assert measured == [1, 2] and all({CREDIT, "time/faithfulness"} <= keys for keys in times[1:])


def test_resumed_with_own_ranks(worlds, task, own_tp2, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(own_tp2, run)
    shutil.rmtree(run / "checkpoints" / "step_00000002")
    shutil.rmtree(run / "hf")
    both = layouts(policy={"tp": 2}, judge={"tp": 2})
    arguments = [*task, *both, "--judge.ranks", "2", "--output_dir", str(run)]
    assert worlds[4, 2].run(train_here, arguments) == [""] * 4
    assert_same_run(run, own_tp2)


def test_one_judge_rank_for_two_of_the_policy(worlds, task, tmp_path):
    """On shared ranks two replicas judge; a row to every response makes the rows the same."""
    task = [*task, "--judge.micro_batch_tokens", "1", "--grpo.preset", "paper"]
    shared, own = tmp_path / "shared", tmp_path / "own"
    assert worlds[2].run(train_here, [*task, "--output_dir", str(shared)]) == ["", ""]
    assert worlds[3, 1].run(train_here, [*task, "--judge.ranks", "1", "--output_dir", str(own)]) == [""] * 3
    assert_same_run(own, shared)


def test_a_judge_with_experts_on_two_ranks(worlds, moe_task, tmp_path):
    """Expert parallel, sampled verdicts, pooled items."""
    task, shared, own = [*moe_task, *layouts(judge={"ep": 2})], tmp_path / "shared", tmp_path / "own"
    assert worlds[2].run(train_here, [*task, "--output_dir", str(shared)]) == ["", ""]
    assert worlds[4, 2].run(train_here, [*task, "--judge.ranks", "2", "--output_dir", str(own)]) == [""] * 4
    assert_same_run(own, shared)


def test_gates_on_own_ranks(worlds, task, tmp_path):
    """Verdicts and gates come from one pass; a tensor parallel judge that recomputes."""
    task = [*task, "--judge.attribution", "gate", "--judge.recompute", "full"]
    task += layouts(policy={"tp": 2}, judge={"tp": 2})
    shared, own = tmp_path / "shared", tmp_path / "own"
    assert worlds[2].run(train_here, [*task, "--output_dir", str(shared)]) == ["", ""]
    assert worlds[4, 2].run(train_here, [*task, "--judge.ranks", "2", "--output_dir", str(own)]) == [""] * 4
    assert_same_run(own, shared)
    assert all(line["attribution/zero_or_nonfinite"] == 0 for line in records(own, "metrics.jsonl") if "loss" in line)


def test_the_judge_works_while_the_policy_samples(worlds, task, tmp_path):
    """By the order of events: a part is judged, gradients included, before the policy has begun to sample the next."""
    events = tmp_path / "events"
    events.mkdir()
    task = [*task, "--judge.ranks", "1", "--output_dir", str(tmp_path / "run"), "--checkpoint.export_hf", "false"]
    task += ["--alarms.every", "0"]  # nothing else goes to the judge
    *policy, judge = worlds[3, 1].run(train_in_order, task, events)
    parts = PARTS * 4  # of two steps and the evaluations before and after them
    assert policy == [[f"sampled {n + 1}" for n in range(parts)]] * 2
    assert judge == [f"judged {n + 1}" for n in range(parts)]


def test_a_judge_that_fails_ends_the_policy_with_its_error(worlds, task, tmp_path):
    """At the judge's weights, and at a verdict that is not finite; on every rank, with the same words."""
    for name, value, said in (("model.norm.weight", None, "is missing"), ("model.norm.weight", "nan", "not finite")):
        judge, run = tmp_path / said, tmp_path / f"run {said}"
        shutil.copytree(TASK / "model", judge)
        weights = load_file(judge / "model.safetensors")
        tensor = weights.pop(name)
        if value is not None:
            weights[name] = torch.full_like(tensor, float(value))
        save_file(weights, judge / "model.safetensors", {"format": "pt"})
        arguments = [*task, "--judge.model", str(judge), "--judge.ranks", "1", "--output_dir", str(run)]
        errors = worlds[3, 1].run(train_here, arguments)
        assert said in errors[0] and len(set(errors)) == 1


def test_a_policy_that_fails_lets_the_judge_end(worlds, task, tmp_path):
    policy = tmp_path / "policy"
    shutil.copytree(TASK / "model", policy)
    (policy / "model.safetensors").write_bytes(b"torn")
    arguments = [*task, "--policy.model", str(policy), "--judge.model", str(TASK / "model"), "--judge.ranks", "1"]
    first, second, judge = worlds[3, 1].run(train_here, [*arguments, "--output_dir", str(tmp_path / "run")])
    assert "model.safetensors" in first and first == second and judge == ""


def test_offloaded_weights(worlds, task, shared_tp2, tmp_path):
    """Self-judging with a KL reference, tied weights and tensor parallelism: same run, and no byte on the device."""
    run = tmp_path / "run"
    both = layouts(policy={"tp": 2}, judge={"tp": 2})
    arguments = [*task, *both, "--judge.offload", "true", "--output_dir", str(run)]
    for found in worlds[2].run(train_with_offload, arguments):
        assert found["mine"] > 0 and found["idle"] == {0} and found["judging"] == {found["mine"]}
    assert_same_run(run, shared_tp2)
    steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()][1:]
    assert all(0 < step["time/judge_load"] < step["time/step"] for step in steps)


def test_offloaded_memory_is_given_back(worlds, tmp_path):
    """To the system, for nothing else holds on to it."""
    [measured] = worlds[1].run(resident_after, large_model(tmp_path / "model"))
    assert_given_back(*measured)


# Without a world.


def test_what_crosses_the_channel_keeps_its_bits():
    """Queries with odd texts and weights; numbers that are not finite, pooled items, a response without tokens."""
    query = Query(
        "\ud800 'q'", ({"role": "user", "content": "\u202eنص\0\n"},), (RubricItem("c", -0.1, ("a", "b"), "x"),)
    )
    part = Part([query], 2, [[5, 0], []], ["k/0", "k/1"], 1 / 3, 2)
    assert Part.from_plain(unpacked(packed(part.plain()))[0]) == part

    pooled = torch.tensor([1e-45, -0.0, float("nan"), float("-inf"), 0.1])
    p = torch.rand(2, generator=torch.Generator().manual_seed(1)).tolist()
    first = [ItemJudgement(*p, True, pooled, 0.1, float("nan")), ItemJudgement(*p, False)]
    first.append(ItemJudgement(*p, True, pooled, 0.1, float("nan")))
    judged = Judged([first, [], [ItemJudgement(0.0, 1.0, True, torch.tensor([2.0]), 2.0, 1.0)]], 0.25, 1e-9)
    judged.faithful, judged.faithful_seconds = [Faithful(1 / 3, -0.1)], 1e-3
    back = Judged.from_plain(*unpacked(packed(*judged.plain())))
    assert (back.verdict_seconds, back.attribution_seconds, back.faithful_seconds) == (0.25, 1e-9, 1e-3)
    assert back.faithful == [Faithful(1 / 3, -0.1)]
    assert [len(row) for row in back.judgements] == [3, 0, 1]
    a, b, c = back.judgements[0]
    assert (a.p_true, a.p_false, a.verdict, a.grad_norm, str(a.cos)) == (*p, True, 0.1, "nan")
    assert a.attribution is c.attribution and b.attribution is None and b.cos is None
    assert torch.equal(a.attribution.view(torch.int32), pooled.view(torch.int32))
    assert back.judgements[2][0] == ItemJudgement(0.0, 1.0, True, torch.tensor([2.0]), 2.0, 1.0)


REFUSED = [
    # (ranks of the job, options, what the line must say)
    (1, ["--judge.ranks", "1"], ["judge.ranks", "1 of 1", "0 in a job of one process"]),
    (4, ["--judge.ranks", "4"], ["judge.ranks", "4 of 4", "at most 3"]),
    (4, ["--judge.ranks", "-1"], ["judge.ranks", "-1", "at least 0"]),
    (4, ["--judge.ranks", "3", "--judge.layout.tp", "2"], ["judge.layout.tp", "the 3 of judge.ranks", "one of [1, 3]"]),
    (4, ["--judge.ranks", "1", "--judge.layout.pp", "2"], ["judge.layout.pp", "2 ranks", "set judge.ranks to 2"]),
    (
        4,
        ["--judge.ranks", "1", "--policy.layout.tp", "2"],
        ["policy.layout.tp", "the 3 that judge.ranks 1 leaves of 4"],
    ),
    (4, ["--judge.ranks", "2", "--judge.layout.ep", "4"], ["judge.layout.ep", "4 ranks", "one of [1, 2]"]),
    (4, ["--judge.ranks", "2", "--judge.offload", "true"], ["judge.offload", "judge.ranks 2", "set one"]),
    (1, ["--judge.parts", "0"], ["judge.parts", "0", "at least 1"]),
    (1, ["--judge.parts", "33"], ["judge.parts", "33", "prompts_per_step 32", "lower"]),
]


@pytest.mark.parametrize(("ranks", "wrong", "said"), REFUSED, ids=[" ".join(wrong) for _, wrong, _ in REFUSED])
def test_refused(ranks, wrong, said, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", str(ranks))
    arguments = ["--policy.model", "m", "--data.train", "[a.jsonl]", "--output_dir", str(tmp_path / "run")]
    assert main(["train", *arguments, *wrong]) == 2
    error = capsys.readouterr().err
    assert error.startswith("g2r: error: ") and error.count("\n") == 1 and all(text in error for text in said), error
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("wrong", [["--judge.ranks", "1"], ["--judge.parts", "2"], ["--judge.offload", "true"]])
def test_judging_a_file_has_no_policy(wrong, tmp_path, capsys):
    arguments = ["--judge.model", "m", "--input", "rows.jsonl", "--output", str(tmp_path / "out.jsonl")]
    assert main(["judge", *arguments, *wrong]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"g2r: error: {wrong[0][2:]}: ") and "g2r judge" in error and "leave it out" in error
