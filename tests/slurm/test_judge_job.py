"""``sbatch slurm/judge.sh``: an array judges a file; a task killed on the way goes on, and the file is that of one job.

Equal bit for bit, with rows judged one at a time (more at a time agree to rounding).
"""

import json
from pathlib import Path

import pytest
from jobs import Job

from g2r_megatron.cli import judge_command
from real_runs import TASK

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(900)]
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
    worlds[1].run(judge_here, ["--config", str(config), *options, "--output", str(alone)])
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
