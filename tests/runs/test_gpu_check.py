"""tools/gpu_check.sh: a dry run of its stages (benchmarks/gpu_check_stages.py), and what becomes of those that fail.

Leaves out the doctor (test_doctor.py), tests/gpu, and every figure that only a GPU has.
"""

import json
import subprocess
from importlib.util import find_spec
from pathlib import Path

import pytest

from scripts import load, run_main

pytestmark = pytest.mark.timeout(1800)
ROOT = Path(__file__).parents[2]
gpu_check = load("benchmarks/gpu_check.py")

WRITES = """
import json, sys, time
file = open({file!r}, "w")
print(json.dumps({{"name": "first", "value": 3.0, "at_most": {bound}}}), file=file, flush=True)
print("what it says", flush=True)
{end}
"""


def figures(lines: list[dict]) -> dict[str, gpu_check.Figure]:
    found = [gpu_check.Figure(**line) for line in lines if "note" not in line]
    assert all(figure.is_good for figure in found), found
    return {figure.name: figure for figure in found}


def test_a_dry_run(tmp_path):
    """The whole command for one stage, which starts a process of its own: the stage passes, and its figures are in the report."""
    command = [str(ROOT / "tools" / "gpu_check.sh"), "--dry-run", "--only", "parity", "--output", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1500, check=False)
    text = (tmp_path / "gpu_check.md").read_text()
    assert done.returncode == 0, done.stdout + done.stderr + text
    content = json.loads((tmp_path / "gpu_check.json").read_text())
    (stage,) = content["stages"]
    assert (stage["stage"], stage["state"]) == ("parity", "passed") and "torch" in content["machine"]["machine"]
    parity = figures(stage["figures"])
    assert parity["logits, relative error"].value <= parity["logits, relative error"].at_most == 1e-4
    assert {"credit, relative error", "gate branch, relative error", "gradient, relative error"} <= set(parity)
    assert all(f"| {name} |" in text for name in parity)


def test_every_stage_has_its_figures(worlds, tmp_path):
    """The other stages that compute something, one after the other in one process."""
    found = {}
    for stage in ("formats", "compilations", "speed", "vllm"):
        file = tmp_path / f"{stage}.jsonl"
        arguments = [stage, "--output", str(file), "--dry-run"]
        worlds[1].run(run_main, "benchmarks/gpu_check_stages.py", arguments, timeout=gpu_check.DRY_RUN_SECONDS)
        found[stage] = [json.loads(line) for line in file.read_text().splitlines()]
    correlations = {f"bf16 torch: {kind}, rank correlation" for kind in ("credit", "gate branch", "gate all")}
    assert correlations <= set(figures(found["formats"]))
    assert "note" in found["compilations"][0]  # counted on a GPU only
    if find_spec("vllm") is None:
        assert "not installed" in found["vllm"][0]["note"]
    else:
        assert set(figures(found["vllm"])) > {"decoding", "new weights"}
    speed = figures(found["speed"])
    assert all(figure.value > 0 for figure in speed.values())
    assert {"judge: verdicts", "decoding", "update: forward and backward"} <= set(speed)


@pytest.mark.parametrize(
    ("bound", "end", "state"),
    [
        (5, "", "passed"),
        (2, "", "failed"),  # beyond the bound
        (5, "raise RuntimeError('no')", "failed"),
        (5, "time.sleep(60)", "timed out"),
    ],
    ids=["passed", "bound not kept", "raised", "hung"],
)
def test_what_a_stage_leaves_is_kept(tmp_path, bound, end, state):
    """Its figures until then, and the end of what it printed when something is wrong."""
    code = WRITES.format(file=str(tmp_path / "some.jsonl"), bound=bound, end=end)
    stage = gpu_check.Stage("some", 20.0, "anything", ("-c", code))
    result = gpu_check.run_stage(stage, tmp_path, dry_run=True, seconds=3.0 if state == "timed out" else 60.0)
    assert result.state == state and [figure.value for figure in result.figures] == [3.0]
    assert "what it says" in result.output
    text = gpu_check.markdown({"machine": "this one"}, [result])
    assert f"## some: {state}" in text and ("**not kept**" in text) == (bound == 2)


def test_stages_fit_into_twelve_minutes():
    assert sum(stage.seconds for stage in gpu_check.STAGES) <= 720


def test_without_a_gpu_only_a_dry_run(tmp_path):
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    done = subprocess.run(
        [str(ROOT / "tools" / "gpu_check.sh")], capture_output=True, text=True, cwd=tmp_path, check=False
    )
    assert done.returncode == 2 and "no CUDA device here" in done.stderr
