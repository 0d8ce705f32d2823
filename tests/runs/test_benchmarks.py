"""Each script of benchmarks/ and examples/ still runs: its smallest run, in seconds, writes what it should.

Leaves out what the figures say, and GPUs. tools/ are run by test_convert.py, the drawings of docs/ by test_readme.py.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from distributed import start_server
from scripts import run_main

ROOT = Path(__file__).parents[2]
SMALL = ["--hidden", "128", "--layers", "1", "--vocab", "512"]
IN_A_RANK = {  # script -> its arguments without --output, and what it writes there
    "benchmarks/step_share.py": (
        ["--steps", "1", "--rollout.prompts_per_step", "2", "--rollout.responses_per_prompt", "2"],
        "step_share.md",
    ),
    "benchmarks/judge_gpu.py": (
        [*SMALL, *("--sequences", "2", "--tokens", "32", "--micro_batch_tokens", "64", "--repetitions", "1")],
        "judge_gpu.md",
    ),
    "benchmarks/eval_cost.py": (
        [
            *("--rows", "2", "--tokens", "4", "--rounds", "1", "--model", str(ROOT / "examples/quickstart/model")),
            *("--data", str(ROOT / "examples/quickstart/data/eval.jsonl"), "--rollout.max_prompt_tokens", "64"),
            *("--rollout.chat_template", "false", "--judge.chat_template", "false", "--judge.max_length", "1024"),
        ],
        "eval_cost.md",
    ),
    "benchmarks/async_save.py": (["--hidden", "64", "--layers", "1", "--saves", "1"], "."),
    "examples/quickstart/make_model.py": (["--steps", "1"], "model.safetensors"),
}
WITH_PROCESSES = {  # they start processes themselves
    "benchmarks/judge_cost.py": (
        [*SMALL, "--rows", "1", "--rounds", "1", "--response-tokens", "16"],
        "judge_cost.md",
    ),
    "benchmarks/judge_growth.py": (
        [*SMALL, "--repetitions", "1", "--lengths", "8", "16", "--criteria", "1", "2", "--longest", "16"],
        "judge_growth.svg",
    ),
    "benchmarks/convert.py": (["--small", "--processes", "1"], "."),
    "benchmarks/credit_study.py": (["--steps", "1", "--seeds", "1", "--variants", "grpo"], "table-1.md"),
    "benchmarks/alarms.py": (["--steps", "1", "--seeds", "1", "--judge_steps", "1", "--at_once", "1"], "table.md"),
    "examples/quickstart/run.py": (
        ["--presets", "robust", "--ranks", "1", "--steps", "1", "--eval.every", "0", "--eval.data", "[]"],
        "report.html",
    ),
}
ELSEWHERE = {  # script -> the test that runs it
    "benchmarks/gpu_check.py": "tests/runs/test_gpu_check.py",
    "benchmarks/gpu_check_stages.py": "tests/runs/test_gpu_check.py",
    "benchmarks/read_rows.py": "tests/unit/test_row_limits.py",
    "benchmarks/rollout.py": "tests/runs/test_vllm_training.py",
    "benchmarks/serve_soak.py": "tests/runs/test_serve.py",
    "examples/arithmetic/run.py": "tests/runs/test_verifiable_training.py",
    "examples/arithmetic/make_data.py": "tests/runs/test_verifiable_training.py",
    "examples/arithmetic/make_model.py": "tests/runs/test_verifiable_training.py",
    "examples/arithmetic/task.py": "tests/runs/test_verifiable_training.py",
    "examples/trl/run.py": "tests/runs/test_serve.py",
    "examples/smollm2/run.py": "tests/runs/test_smollm2.py",
    "examples/smollm2/make_model.py": "tests/runs/test_smollm2.py",
    "examples/smollm2/make_data.py": "tests/unit/test_smollm2_data.py",
    "examples/smollm2/make_judge.py": "tests/unit/test_smollm2_judge.py",
    "examples/quickstart/make_data.py": "tests/unit/test_quickstart_task.py",
    "examples/quickstart/task.py": "tests/unit/test_quickstart_task.py",
    "examples/toy_models.py": "tests/runs/test_benchmarks.py",
    "benchmarks/machine.py": "tests/runs/test_benchmarks.py",
    "benchmarks/grpo_step.py": "tests/runs/test_benchmarks.py",
    "tools/convert_hf_to_megatron.py": "tests/parity/test_convert.py",
    "tools/convert_megatron_to_hf.py": "tests/parity/test_convert.py",
    "tools/verify_checkpoint.py": "tests/parity/test_convert.py",
}


@pytest.mark.parametrize("script", IN_A_RANK)
def test_a_script_of_one_rank(worlds, tmp_path, script):
    arguments, written = IN_A_RANK[script]
    output = tmp_path / "table.md" if written == "." else tmp_path
    (printed,) = worlds[1].run(run_main, script, [*arguments, "--output", str(output)])
    assert printed and (output if written == "." else tmp_path / written).stat().st_size > 0


@pytest.mark.parametrize("script", WITH_PROCESSES)
@pytest.mark.timeout(900)  # four starts of Python, and the disk
def test_a_script_with_processes_of_its_own(tmp_path, monkeypatch, script):
    arguments, written = WITH_PROCESSES[script]
    start_server()  # the scripts' processes are forked from it
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", str(2**16))  # set by some: restored
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    output = tmp_path / "table.md" if written == "." else tmp_path
    try:
        run_main(script, [*arguments, "--output", str(output)])
    except SystemExit as end:  # judge_growth.py's verdict on its figures, which mean nothing for a run so small
        assert "not within" in str(end)
    assert (output if written == "." else tmp_path / written).stat().st_size > 0


@pytest.mark.timeout(900)  # a start of Python with TRL
def test_the_benchmark_beside_trl():
    """In a process of its own: transformers' Trainer would take the ranks of a test for its own."""
    sizes = ["--prompts", "1", "--group", "2", "--tokens", "3", "--steps", "2", "--judge_items", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "benchmarks/grpo_step.py", *sizes]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=800, check=False)
    assert done.returncode == 0, done.stderr
    assert [line.split()[0] for line in done.stdout.splitlines()[-4:]] == ["sample", "judge", "step", "update"]


def test_the_benchmark_of_engines_with_many_lengths(worlds):
    """Both engines make responses of the lengths that were drawn: else the script ends with an error."""
    sizes = ["--mixed", "--prompts", "5", "--slots", "2", "--tokens", "6", "--rounds", "1"]
    (printed,) = worlds[1].run(run_main, "benchmarks/rollout.py", [*sizes, "--engines", "megatron", "transformers"])
    assert "2 at a time" in printed and "Megatron engine" in printed and "of transformers" in printed


def test_every_script_has_its_run():
    """A new script is added to one of the tables above."""
    folders = ("benchmarks", "examples", "tools")
    found = {str(path.relative_to(ROOT)) for folder in folders for path in (ROOT / folder).rglob("*.py")}
    known = {*IN_A_RANK, *WITH_PROCESSES, *ELSEWHERE}
    assert found == known
    for script, test in ELSEWHERE.items():
        assert Path(script).stem in (ROOT / test).read_text(), f"{test} does not run {script}"
