"""``--rollout.engine vllm``: real runs of a few steps on the quickstart's task, evaluations, and what is refused before them.

Leaves out what the engine samples (tests/parity/test_vllm.py) and GPUs.
"""

import os
import shutil
import signal
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from multiprocessing.connection import Connection

import pytest

from distributed import PROCESSES, server_with, start_server
from g2r_megatron.cli import train_command
from g2r_megatron.config import checks
from g2r_megatron.config.options import RolloutConfig, VLLMConfig
from g2r_megatron.errors import UserError
from g2r_megatron.rollout.vllm.environment import CPU_ENVIRONMENT, ENVIRONMENT
from real_runs import (
    PATIENCE,
    TASK,
    checkpoints,
    finish,
    log_of,
    nothing_is_left_of,
    quickstart_options,
    records,
    send,
    start_forked,
    wait_for,
)
from scripts import run_main
from test_bad_input import assert_refused, run
from test_eval_command import sampled
from tiny_models import build_tiny_hf

with_vllm = [
    pytest.mark.vllm,
    pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed (make vllm)"),
]


def in_another_process(commands: list[list[str]]) -> list[tuple[int, str, str]]:
    """(exit code, stdout, stderr) of each command line."""
    start_server()
    here, there = PROCESSES.Pipe()
    process = PROCESSES.Process(target=run_all, args=(commands, there), daemon=True)
    process.start()
    there.close()
    results = here.recv()
    process.join()
    return results


def run_all(commands: list[list[str]], connection: Connection) -> None:
    """In the other process."""
    connection.send([run(command) for command in commands])


def train_without_vllm(arguments: list[str]) -> None:
    """``g2r train`` in this process, as if vLLM were not installed."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "vllm"]:
        del sys.modules[name]
    sys.modules["vllm"] = None
    train_command(arguments)


@pytest.fixture(scope="module")
def options(tmp_path_factory) -> list[str]:
    return [
        *quickstart_options(tmp_path_factory.mktemp("data")),
        *("--rollout.engine", "vllm", "--optimizer.lr", "1e-3", "--steps", "4", "--rollout.temperature", "0.8"),
    ]


class TestRuns:
    pytestmark = with_vllm

    @pytest.fixture(scope="class", autouse=True)
    @classmethod
    def vllm_is_imported_once(cls, worlds) -> Iterator[None]:
        with server_with("vllm", **ENVIRONMENT, **CPU_ENVIRONMENT):
            yield
            worlds.close()  # the server waits for its processes

    def test_two_ranks_train_until_one_is_killed(self, options, tmp_path):
        """Large updates, correction and evaluation: the sampler's log-probs stay the trainer's.

        Then kill -9 of one rank: the run ends, with the engines in it and all that they started.
        """
        run = tmp_path / "run"

        def steps() -> list[dict]:
            return records(run, "metrics.jsonl")[1:] if (run / "metrics.jsonl").exists() else []

        process = start_forked(run, [*options, "--steps", "1000", "--rollout.correction", "tis"], ranks=2)
        try:
            wait_for(lambda: len(steps()) >= 4, process, run)
            os.kill(process.pids[1], signal.SIGKILL)
            assert process.wait(PATIENCE) != 0
            assert nothing_is_left_of(run)
        finally:
            send(run, signal.SIGKILL)
        assert [record["step"] for record in steps()][:4] == [1, 2, 3, 4]
        for record in steps():
            assert 0 < record["rollout/sync_error"] < 1e-4  # another program, the same weights
            assert record["rollout/corrected_share"] == 0

    def test_a_run_resumed_and_replayed(self, worlds, options, tmp_path):
        """Resumed after step 2 of 4: the engine, which begins with the start weights, gets the new ones.

        Replayed from its dump, without vLLM, they are the same steps bit for bit.
        """
        whole, resumed, again, dump = (tmp_path / name for name in ("whole", "resumed", "again", "dump"))
        options = [*options, "--rollout.correction", "tis"]
        finish(whole, [*options, "--rollout.dump", str(dump)])
        worlds[1].run(train_without_vllm, [*options, "--output_dir", str(again), "--rollout.replay", str(dump)])
        worlds.close()
        for name in ("metrics.jsonl", "samples.jsonl"):
            assert records(again, name) == records(whole, name)
        weights = [(path / "hf" / "model.safetensors").read_bytes() for path in (again, whole)]
        assert weights[0] == weights[1]
        assert (whole / "hf" / "model.safetensors").exists() and checkpoints(whole)[0] == "step_00000002"
        shutil.copytree(whole, resumed)
        shutil.rmtree(resumed / "hf")
        shutil.rmtree(resumed / "checkpoints" / "step_00000004")
        finish(resumed, options)
        assert "resuming after step 2" in log_of(resumed)
        steps, expected = (
            [record for record in records(path, "metrics.jsonl") if "loss/policy" in record]
            for path in (resumed, whole)
        )
        assert [record["step"] for record in steps] == [record["step"] for record in expected] == [1, 2, 3, 4]
        for ours, theirs in zip(steps, expected, strict=True):
            for name in ("reward/mean", "response/length_mean", "loss/policy"):
                assert ours[name] == pytest.approx(theirs[name], rel=1e-4, abs=1e-6), (ours["step"], name)
            assert ours["rollout/sync_error"] < 1e-4

    def test_the_benchmark_of_engines(self, worlds, tmp_path):
        """The smallest run of benchmarks/rollout.py prints its ratios."""
        model = build_tiny_hf("qwen3", tmp_path / "model", head_dim=32)
        sizes = ["--prompts", "2", "--prompt_tokens", "4", "--tokens", "4", "--rounds", "1"]
        (printed,) = worlds[1].run(run_main, "benchmarks/rollout.py", ["--model", str(model), *sizes])
        worlds.close()
        assert "our vLLM engine" in printed and "of raw vLLM" in printed and "ratio" in printed

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
