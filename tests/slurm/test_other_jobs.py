"""``sbatch slurm/judge.sh`` and ``slurm/convert_30b.sh``: whole files, also from tasks that were killed on the way.

The array's file is that of one process, bit for bit with rows judged one at a time (more at a time agree to rounding).
What the conversions write is checked in test_convert.py.
"""

import json
from pathlib import Path

import pytest
from jobs import PATIENCE, Job
from safetensors.torch import load_file

from g2r_megatron.cli import judge_command
from real_runs import TASK

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(3600)]
SHARDS, ROWS = 2, 240


def judge_here(arguments: list[str]) -> None:
    judge_command(arguments)


def test_an_array_whose_task_is_killed(worlds, tmp_path):
    rows, alone, output = tmp_path / "rows.jsonl", tmp_path / "alone.jsonl", tmp_path / "out.jsonl"
    queries = [json.loads(line) for line in (TASK / "data" / "train.jsonl").read_text().splitlines()]
    lines = [{**queries[i % len(queries)], "id": f"row {i}", "response": f"rest {i} days. " * 3} for i in range(ROWS)]
    rows.write_text("".join(json.dumps(line) + "\n" for line in lines))
    config = tmp_path / "judge.yaml"
    config.write_text(
        f"judge: {{model: {TASK / 'model'}, chat_template: false, "
        'template: "{conversation} | {response} | {criterion} =>"}\n'
    )
    options = ["--input", str(rows), "--batch_rows", "1"]
    worlds[1].run(judge_here, ["--config", str(config), *options, "--output", str(alone)], timeout=PATIENCE)
    worlds.close()

    def submit() -> list[Job]:
        array = Job(
            "judge", [*options, "--output", str(output)], tmp_path,
            f"--array=0-{SHARDS - 1}", f"--output={tmp_path}/judge-%a.log", CONFIG=str(config),
        )  # fmt: skip
        return [array.task(number) for number in range(SHARDS)]

    first, second = submit()
    partial = tmp_path / "out.jsonl.parts" / f".{0:05d}-of-{SHARDS:05d}.jsonl.partial"
    first.wait(lambda: lines_of(partial) > 3)
    first.kill_rank(0)
    first.wait(lambda: first.attempt() == 2)
    assert first.end() == second.end() == "COMPLETED 0:0"
    assert second.attempt() == 1
    assert "of them before), mean reward" in first.text()
    assert output.read_bytes() == alone.read_bytes()

    for task in submit():  # once more: nothing is left to do
        assert task.end() == "COMPLETED 0:0"
        assert "finished already" in task.text()


def lines_of(path: Path) -> int:
    try:
        return path.read_bytes().count(b"\n")
    except FileNotFoundError:
        return 0


def test_converted_both_ways(tmp_path):
    """One process, without a GPU; the second job reads what the first has written."""
    there, back = tmp_path / "megatron", tmp_path / "hf"
    for options in (
        ["--hf", str(TASK / "model"), "--output", str(there)],
        [f"--checkpoint={there}", f"--output={back}"],
    ):
        job = Job("convert_30b", options, tmp_path, PROCESSES="1")
        assert job.end() == "COMPLETED 0:0", job.text()
    assert load_file(back / "model.safetensors").keys() == load_file(TASK / "model" / "model.safetensors").keys()
