"""``--rollout.engine vllm``: real runs of a few steps on the quickstart's task, evaluations, and what is refused before them.

Leaves out what the engine samples (tests/parity/test_vllm.py) and GPUs.
"""

import json
import os
import signal
import subprocess
import sys
from importlib.util import find_spec

import pytest

from g2r_megatron.config import checks
from g2r_megatron.config.options import RolloutConfig, VLLMConfig
from g2r_megatron.errors import UserError
from real_runs import (
    PATIENCE,
    ROOT,
    TASK,
    nothing_is_left_of,
    processes_of,
    quickstart_options,
    records,
    send,
    start,
    train_command,
    wait_for,
)
from test_bad_input import assert_refused, run
from test_eval_command import sampled
from tiny_models import build_tiny_hf

with_vllm = [
    pytest.mark.vllm,
    pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed (make vllm)"),
]


def in_another_process(commands: list[list[str]]) -> list[list]:
    """(exit code, stdout, stderr) of each command line."""
    code = "import json, sys; from test_bad_input import run; print(json.dumps([run(c) for c in json.load(sys.stdin)]))"
    paths = [ROOT, ROOT / "tests", ROOT / "tests" / "runs"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(map(str, paths))}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, input=json.dumps(commands), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def options(tmp_path_factory) -> list[str]:
    return [
        *quickstart_options(tmp_path_factory.mktemp("data")),
        *("--rollout.engine", "vllm", "--optimizer.lr", "1e-3", "--steps", "4", "--rollout.temperature", "0.8"),
    ]


class TestRuns:
    pytestmark = with_vllm

    def test_a_run_on_two_ranks(self, options, tmp_path):
        """Four steps with large updates, correction and evaluation: the sampler's log-probs stay the trainer's."""
        done = train_command([*options, "--rollout.correction", "tis", "--output_dir", str(tmp_path / "run")], ranks=2)
        assert done.returncode == 0, done.stderr
        steps = [record for record in records(tmp_path / "run", "metrics.jsonl") if record["step"] > 0]
        assert [record["step"] for record in steps] == [1, 2, 3, 4]
        for record in steps:
            assert 0 < record["rollout/sync_error"] < 1e-4  # another program, the same weights
            assert record["rollout/corrected_share"] == 0
        assert (tmp_path / "run" / "hf" / "model.safetensors").exists()

    def test_a_resumed_run_samples_with_the_resumed_weights(self, options, tmp_path):
        """Stopped after two steps and started again: the engine, which begins with the start weights, gets the new ones."""
        whole, parts = tmp_path / "whole", tmp_path / "parts"
        assert train_command([*options, "--output_dir", str(whole)]).returncode == 0
        assert train_command([*options, "--steps", "2", "--output_dir", str(parts)]).returncode == 0
        done = train_command([*options, "--output_dir", str(parts)])
        assert done.returncode == 0, done.stderr
        resumed, uninterrupted = (
            [record for record in records(path, "metrics.jsonl") if "loss/policy" in record] for path in (parts, whole)
        )
        assert [record["step"] for record in resumed] == [record["step"] for record in uninterrupted] == [1, 2, 3, 4]
        for ours, theirs in zip(resumed, uninterrupted, strict=True):
            for name in ("reward/mean", "response/length_mean", "loss/policy"):
                assert ours[name] == pytest.approx(theirs[name], rel=1e-4, abs=1e-6), (ours["step"], name)
            assert ours["rollout/sync_error"] < 1e-4

    def test_the_benchmark_of_engines(self, tmp_path):
        """The smallest run of benchmarks/rollout.py prints its ratios."""
        model = build_tiny_hf("qwen3", tmp_path / "model", head_dim=32)
        sizes = ["--prompts", "2", "--prompt_tokens", "4", "--tokens", "4", "--rounds", "1"]
        command = [sys.executable, "benchmarks/rollout.py", "--model", str(model), *sizes]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=800)
        assert done.returncode == 0, done.stderr
        assert "our vLLM engine" in done.stdout and "of raw vLLM" in done.stdout and "ratio" in done.stdout

    def test_evaluations_and_what_vllm_cannot_run(self, worlds, options, tmp_path):
        """`g2r eval` answers and scores the same with both engines, greedily. Options and models that vLLM cannot run are
        refused before anything is written. All of vLLM in one process: it stays imported there."""
        small_heads = build_tiny_hf("qwen3", tmp_path / "heads")
        narrow_experts = build_tiny_hf("qwen3_moe", tmp_path / "experts", head_dim=32)
        refused = [
            (["--rollout.vllm.options", "{no_such_option: 1}"], ["rollout.vllm.options", "no_such_option"]),
            (["--rollout.vllm.options", "{block_size: many}"], ["rollout.vllm.options", "block_size"]),
            (["--rollout.vllm.options", "{tensor_parallel_size: 2}"], ["tensor_parallel_size is set by g2r"]),
            (["--policy.model", str(small_heads)], ["rollout.engine", "heads of 16"]),
            (["--policy.model", str(narrow_experts)], ["rollout.engine", "experts of width 48"]),
        ]
        commands = [["train", *options, *more, "--output_dir", str(tmp_path / "run")] for more, _ in refused]
        rows = tmp_path / "rows.jsonl"
        rows.write_text("".join((TASK / "data" / "eval.jsonl").read_text().splitlines(keepends=True)[:6]))
        engines = ("megatron", "vllm")
        evaluations = [sampled(rows, tmp_path / name, "--greedy", "--rollout.engine", name) for name in engines]
        results = [*in_another_process([*commands, evaluations[1]]), *worlds[1].run(run, evaluations[0])]
        for result, (_, said) in zip(results, refused, strict=False):
            assert_refused(tuple(result), *said)
        assert not (tmp_path / "run").exists()
        for code, out, err in results[len(refused) :]:
            assert code == 0 and "g2r, 6 rows" in out, err
        megatron, vllm = (records(tmp_path / name, "responses.jsonl") for name in engines)
        assert [r["response"] for r in vllm] == [r["response"] for r in megatron]
        assert [(r["score"], r["length"], r["finished"]) for r in vllm] == [
            (r["score"], r["length"], r["finished"]) for r in megatron
        ]


@pytest.mark.vllm
@pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed (make vllm)")
def test_nothing_outlives_a_killed_rank(options, tmp_path):
    """kill -9 of one of two ranks while they train: the run ends, with the engines in it and all that they started."""
    run = tmp_path / "run"
    process = start(run, [*options, "--steps", "1000", "--eval.every", "0"], ranks=2)
    try:
        wait_for(lambda: (run / "metrics.jsonl").exists(), process, run)
        (rank,) = processes_of(run, 1)
        os.kill(rank, signal.SIGKILL)
        assert process.wait(PATIENCE) != 0
        assert nothing_is_left_of(run)
    finally:
        send(run, signal.SIGKILL)


@pytest.mark.parametrize(
    ("options_of_rollout", "where"),
    [
        ({"top_p": 0.9, "correction": "tis"}, "rollout.correction"),
        ({"top_k": 5, "temperature": 0.7}, "rollout.temperature"),
        ({"correction_bounds": [1.2, 2.0]}, "rollout.correction_bounds"),
        ({"correction_bounds": [0.5]}, "rollout.correction_bounds"),
        ({"correction": "tis", "correction_bounds": [0.5, 2.0]}, "rollout.correction_bounds"),
        ({"vllm": VLLMConfig(mode="servers")}, "rollout.vllm.urls"),
        ({"vllm": VLLMConfig(mode="servers", urls=["http://127.0.0.1:1", "http://127.0.0.1:1"])}, "rollout.vllm.urls"),
        ({"vllm": VLLMConfig(mode="servers", urls=["http://192.0.2.7:8000"])}, "rollout.vllm.urls"),
        ({"vllm": VLLMConfig(mode="servers", urls=["http://vllm.example:8000"])}, "rollout.vllm.urls"),
        ({"vllm": VLLMConfig(mode="servers", urls=["127.0.0.1:8000"])}, "rollout.vllm.urls"),
        ({"vllm": VLLMConfig(mode="servers", urls=["http://[::1]:99999"])}, "rollout.vllm.urls"),
        (
            {"vllm": VLLMConfig(mode="servers", urls=["http://[::1]:1"], options={"block_size": 8})},
            "rollout.vllm.options",
        ),
    ],
)
def test_rollout_options_that_do_not_fit(options_of_rollout, where):
    with pytest.raises(UserError) as error:
        checks._check_engine(RolloutConfig(engine="vllm", **options_of_rollout))
    assert error.value.where == where


def test_servers_that_are_accepted(monkeypatch):
    """On loopback, or behind a proxy that the user vouches for; the trainer needs no vLLM of its own."""
    monkeypatch.setattr(checks, "find_spec", lambda name: None)
    checks._check_engine(
        RolloutConfig(engine="vllm", vllm=VLLMConfig(mode="servers", urls=["http://localhost:1", "http://[::1]:1"]))
    )
    vllm = VLLMConfig(mode="servers", urls=["https://vllm.example"], behind_proxy=True)
    checks._check_engine(RolloutConfig(engine="vllm", vllm=vllm))


def test_without_the_package(monkeypatch):
    """One line that says how to install it."""
    monkeypatch.setattr(checks, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="rollout.engine: vllm, but the package vllm is not installed; .*make vllm"):
        checks._check_engine(RolloutConfig(engine="vllm"))
