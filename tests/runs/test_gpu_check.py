"""tools/gpu_check.sh: a dry run of its stages (benchmarks/gpu_check_stages.py), and what becomes of those that fail.

Leaves out the doctor (test_doctor.py), tests/gpu, and every figure that only a GPU has.
"""

import json
import subprocess
from importlib.util import find_spec
from pathlib import Path

import pytest

from scripts import load

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


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> tuple[dict, str]:
    """(gpu_check.json, gpu_check.md) of a dry run of the stages that compute something."""
    output = tmp_path_factory.mktemp("check")
    command = [str(ROOT / "tools" / "gpu_check.sh"), "--dry-run", "--only", "parity,formats,compilations,speed,vllm"]
    done = subprocess.run(
        [*command, "--output", str(output)], capture_output=True, text=True, timeout=1500, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr + (output / "gpu_check.md").read_text()
    return json.loads((output / "gpu_check.json").read_text()), (output / "gpu_check.md").read_text()


def test_the_dry_run_has_every_figure(report):
    content, text = report
    stages = {stage["stage"]: stage for stage in content["stages"]}
    assert (
        list(stages) == ["parity", "formats", "compilations", "speed", "vllm"]
        and "torch" in content["machine"]["machine"]
    )
    assert {stage["state"] for stage in stages.values()} == {"passed"}
    parity = {figure["name"]: figure for figure in stages["parity"]["figures"]}
    assert parity["logits, relative error"]["value"] <= parity["logits, relative error"]["at_most"] == 1e-4
    assert {"credit, relative error", "gate branch, relative error", "gradient, relative error"} <= set(parity)
    formats = {figure["name"] for figure in stages["formats"]["figures"]}
    assert {f"bf16 torch: {kind}, rank correlation" for kind in ("credit", "gate branch", "gate all")} <= formats
    assert stages["compilations"]["notes"]  # counted on a GPU only
    if find_spec("vllm") is None:
        assert "not installed" in stages["vllm"]["notes"][0]
    else:
        assert {figure["name"] for figure in stages["vllm"]["figures"]} > {"decoding", "new weights"}
    speed = {figure["name"]: figure["value"] for figure in stages["speed"]["figures"]}
    assert all(value > 0 for value in speed.values())
    assert {"judge: verdicts", "decoding", "update: forward and backward"} <= set(speed)
    for name in (*parity, *speed):
        assert f"| {name} |" in text


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


def test_stages_fit_into_eight_minutes():
    assert sum(stage.seconds for stage in gpu_check.STAGES) <= 480


def test_without_a_gpu_only_a_dry_run(tmp_path):
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    done = subprocess.run(
        [str(ROOT / "tools" / "gpu_check.sh")], capture_output=True, text=True, cwd=tmp_path, check=False
    )
    assert done.returncode == 2 and "no CUDA device here" in done.stderr
