"""`g2r plan`: parameters as the real models have them, problems with their fix, layouts that work, exit codes.

Everything runs in one process of its own with fake process groups, as the command does. Leaves out what the memory
formulas say (test_plan_memory.py) and how true the times are: their speeds are assumptions that the output states.
"""

import contextlib
import io
import json
import multiprocessing
import shutil
from concurrent.futures import ProcessPoolExecutor
from importlib.util import find_spec
from pathlib import Path

import pytest

from g2r_megatron.config.options import Layout
from test_real_configs import LAYOUTS, PARAMETERS

CONFIGS = Path(__file__).parents[1] / "real_configs"
SLOWEST = 240.0  # seconds
TWO_NODES = ["--nodes", "2", "--policy.precision.dtype", "bf16", "--judge.precision.dtype", "bf16"]
JUDGE_30B = ["--judge.layout.tp", "4", "--judge.layout.ep", "8", "--judge.layout.sp"]
POLICY_8B = ["--policy.layout.tp", "4", "--policy.layout.sp", "--policy.recompute", "full"]


@pytest.fixture(scope="module")
def process():
    """A process of its own for fake process groups: they are global, and other tests have real ones."""
    with ProcessPoolExecutor(max_workers=1, mp_context=multiprocessing.get_context("forkserver")) as pool:
        yield pool


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """``models(name)`` -> a directory with nothing but the published config.json."""

    def directory(name: str) -> str:
        path = tmp_path_factory.getbasetemp() / "configs" / name
        path.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(CONFIGS / f"{name}.json", path / "config.json")
        return str(path)

    return directory


@pytest.fixture
def plan(process, models):
    """``plan(policy, judge, *options)`` -> (exit code, stdout, stderr) of `g2r plan`; ``judge`` None: self-judging."""

    def run(policy: str, judge: str | None, *options: str):
        argv = ["plan", "--policy.model", models(policy), *options]
        argv += ["--judge.model", models(judge)] if judge else []
        return process.submit(run_cli, argv).result(SLOWEST)

    return run


# In that process.


def run_cli(argv: list[str]) -> tuple[int, str, str]:
    from g2r_megatron.cli import main

    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(argv)
    return code, out.getvalue(), err.getvalue()


def both_counts(directory: str, ranks: int, layout: Layout) -> tuple[list, list]:
    from g2r_megatron.model.hf import open_hf_model
    from g2r_megatron.plan.stages import built_stages, expected_stages

    hf = open_hf_model(directory, "policy.model")
    return built_stages("policy", hf, layout, "bf16", ranks), expected_stages(hf, layout, ranks)


# The tests.


@pytest.mark.parametrize(("name", "ranks", "layout"), LAYOUTS, ids=[f"{n}-{r}_ranks" for n, r, _ in LAYOUTS])
def test_the_formula_counts_what_the_real_model_has(process, models, name, ranks, layout):
    """Stage by stage, exactly: what the search goes by is what the plan (and training) builds."""
    built, expected = process.submit(both_counts, models(name), ranks, layout).result(SLOWEST)
    assert built == expected
    pipeline = sum(stage.dense + stage.vocabulary for stage in built) * layout.tp
    experts = sum(stage.experts for stage in built) * layout.ep * layout.etp
    # norms and routers are on every tensor parallel rank, the vocabulary is padded, a tied one is on two stages
    assert PARAMETERS[name] <= pipeline + experts < 1.2 * PARAMETERS[name]


def test_a_job_that_fits(plan):
    """Exit code 0, every number of the tables in JSON, memory parts that add up."""
    code, out, err = plan("Qwen3-8B", "Qwen3-30B-A3B", *TWO_NODES, *JUDGE_30B, *POLICY_8B, "--json")
    content = json.loads(out)
    assert (code, err, content["problems"], content["fits"]) == (0, "", [], True)
    assert [model["ranks"] for model in content["models"]] == [[0, 15], [0, 15]]
    (group,) = content["memory"]  # one stage each: all ranks alike
    assert group["static"]["policy weights"] == 2 * content["models"][0]["stages"][0]["total"]
    assert group["static"]["gradients"] == 2 * group["static"]["policy weights"]
    # fp32 main weights and two moments over the 4 replicas
    assert group["static"]["optimizer"] == 12 * content["models"][0]["stages"][0]["total"] / 4
    largest = max(sum(parts.values()) for parts in group["phases"].values())
    assert group["peak"] == sum(group["static"].values()) + largest < content["usable_bytes"]
    names = [phase["name"] for phase in content["phases"]]
    assert names == ["rollout", "verdicts", "attribution", "update"]
    assert content["step_seconds"] == pytest.approx(sum(phase["seconds"] for phase in content["phases"]))


# vLLM servers need no vLLM where the plan is made
ON_SERVERS = (
    "--rollout.engine",
    "vllm",
    "--rollout.vllm.mode",
    "servers",
    "--rollout.vllm.urls",
    '["http://127.0.0.1:1"]',
)


@pytest.mark.parametrize("option", [("--grpo.mini_batches", "2"), (*ON_SERVERS, "--rollout.correction", "tis")])
def test_a_pass_for_old_log_probs_is_planned_where_one_is_needed(plan, option):
    """Several mini-batches or a correction: the update's own log-probs come too late."""
    content = json.loads(plan("Qwen3-8B", "Qwen3-30B-A3B", *TWO_NODES, *JUDGE_30B, *POLICY_8B, *option, "--json")[1])
    phases = {phase["name"]: phase["seconds"] for phase in content["phases"]}
    assert 0 < phases["old log-probs"] < phases["update"]
    assert content["step_seconds"] == pytest.approx(sum(phases.values()))


def test_tables_are_plain_text_with_assumptions(plan):
    """No control codes in a pipe or a Slurm log."""
    code, out, _ = plan("Qwen3-8B", "Qwen3-30B-A3B", *TWO_NODES, *JUDGE_30B, *POLICY_8B)
    assert code == 0 and "\x1b" not in out and out.isascii()
    assert "GiB a rank" in out and "assumed: 256 responses" in out and "989 TFLOP/s" in out
    assert "not there yet: data.train is not given" in out  # a note, not a problem


def test_stages_are_reported_apart(plan):
    """Policy over 2 stages, judge over 4: four groups of ranks; the first stages hold more micro-batches in flight."""
    options = ["--policy.layout.pp", "2", "--judge.layout.pp", "4", "--policy.layout.tp", "4", "--policy.layout.sp"]
    content = json.loads(plan("Qwen3-8B", "Qwen3-30B-A3B", *TWO_NODES, *options, "--json")[1])
    places = [(g["first"], g["last"], g["policy_stage"], g["judge_stage"]) for g in content["memory"]]
    assert places == [(0, 3, 0, 0), (4, 7, 0, 1), (8, 11, 1, 2), (12, 15, 1, 3)]
    kept = [group["phases"]["attribution"]["activations"] for group in content["memory"]]
    assert kept == sorted(kept, reverse=True) and kept[0] > 3 * kept[-1]


def test_self_judging_holds_the_frozen_policy_once(plan):
    """The judge is the KL reference too: no third copy. An external judge needs one."""
    options = ["--grpo.kl_coef", "0.01", *TWO_NODES, "--json"]
    own = json.loads(plan("Qwen2.5-1.5B", None, *options)[1])
    other = json.loads(plan("Qwen2.5-1.5B", "Qwen3-8B", *options)[1])
    assert "reference weights" not in own["memory"][0]["static"]
    assert other["memory"][0]["static"]["reference weights"] == other["memory"][0]["static"]["policy weights"]
    assert "reference" in own["memory"][0]["phases"] and "reference" in other["memory"][0]["phases"]


def test_a_gold_judge_takes_memory_while_it_judges(plan, models):
    """Its weights are on the device in its own phase, beside what the rank always holds; a layout of its own halves them."""
    gold = ["--eval.judge.model", models("Qwen3-30B-A3B"), "--eval.judge.precision.dtype", "bf16"]
    layout = ["--eval.judge.layout.tp", "4", "--eval.judge.layout.sp", "--eval.judge.layout.ep"]
    options = [*TWO_NODES, *POLICY_8B, "--json", *layout]
    found = {}
    for ep in (4, 8):
        content = json.loads(plan("Qwen3-8B", None, *options, str(ep), *gold)[1])
        (group,) = content["memory"]
        found[ep] = group["phases"]["evaluation by eval.judge"]
        assert content["models"][-1]["name"] == "eval.judge" and content["problems"] == []
        assert found[ep]["judge weights"] == 2 * content["models"][-1]["stages"][0]["total"]
        assert group["peak"] >= sum(group["static"].values()) + sum(found[ep].values())
        assert any("eval.judge pins" in note for note in content["notes"])
    assert 1.7 < found[4]["judge weights"] / found[8]["judge weights"] < 2
    code, _, err = plan("Qwen3-8B", None, *TWO_NODES, *POLICY_8B, "--eval.judge.layout.tp", "3", *gold)
    assert code == 2 and "eval.judge.layout" in err


def test_what_does_not_fit_comes_with_a_fix_that_does(plan):
    """One line that names the ranks, the phase, the parts and options; the same command with these options fits."""
    code, _, err = plan("Qwen3-8B", "Qwen3-30B-A3B", *TWO_NODES, "--judge.layout.ep", "8", "--policy.layout.tp", "1")
    assert code == 2 and err.count("g2r: error: ") == 1
    assert "ranks 0-15" in err and "gradients 30.5" in err and "fits with --" in err
    fix = err.partition("fits with ")[2].partition(", or ")[0].split()
    code, _, err = plan("Qwen3-8B", "Qwen3-30B-A3B", *TWO_NODES, "--judge.layout.ep", "8", *fix)
    assert (code, err) == (0, "")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            ["--policy.layout.tp", "3"],
            "policy.layout.tp x policy.layout.cp x policy.layout.pp: 3 x 1 x 1 = 3 ranks do not divide the world of 16",
        ),
        (["--judge.layout.tp", "8"], "judge.layout.sp: false with tp 8 and experts"),
        (["--judge.layout.pp", "16", "--judge.layout.stage_layers", "[1, 2]"], "judge.layout.stage_layers: [1, 2]"),
        (
            ["--judge.precision.fp8", "tensorwise", "--judge.precision.dtype", "fp32"],
            "set judge.precision.dtype to bf16",
        ),
        (["--judge.precision.fp8", "mxfp8", "--judge.spec", "torch"], "FP8 needs Transformer Engine"),
        (["--rollout.temperature", "0"], "rollout.temperature: 0 makes the responses of a prompt all the same"),
        (["--nodes", "0"], "nodes: 0; must be at least 1"),
        (
            ["--judge.model", "nowhere"],
            "judge.model: 'nowhere' is no directory; must be a Hugging Face model directory",
        ),
        (["--hardware.tflops", "0"], "hardware.tflops: 0.0; must be more than 0"),
    ],
    ids=lambda value: value[0].lstrip("-") if isinstance(value, list) else "",
)
def test_training_s_mistakes_are_the_plan_s(plan, options, said):
    """Exit code 2 and the line that training would end with, and no table; FP8 is no mistake for want of a GPU here."""
    judge = None if "--judge.model" in options else "Qwen3-30B-A3B"
    code, out, err = plan("Qwen3-8B", judge, *TWO_NODES, *options)
    assert code == 2 and said in err and "GiB a rank" not in out
    assert all(line.startswith("g2r: error: ") for line in err.splitlines())


def test_fp8_and_transformer_engine_are_planned_without_a_gpu(plan):
    """The plan is for the cluster's machines, not for the one it runs on."""
    options = ["--judge.precision.fp8", "blockwise", "--judge.spec", "te", *JUDGE_30B, *POLICY_8B, "--json"]
    code, out, _ = plan("Qwen3-8B", "Qwen3-30B-A3B", *TWO_NODES, *options)
    assert code == 0 and json.loads(out)["models"][1]["layout"]["ep"] == 8


def test_every_problem_is_reported(plan):
    """Two mistakes are two lines: queueing is slow, so all of them at once."""
    _, _, err = plan("Qwen3-8B", "Qwen3-30B-A3B", *TWO_NODES, "--policy.layout.tp", "3", "--judge.layout.tp", "8")
    assert "policy.layout.tp: 3 does not divide the 32 attention heads" in err
    assert "judge.layout.sp: false with tp 8 and experts" in err


def test_present_files_are_read_as_training_reads_them(process, tmp_path, tiny_hf):
    """A directory with tokenizer and weights and a data file: a bad row is a problem before the job is queued."""
    data = tmp_path / "rows.jsonl"
    row = {"id": "a", "prompt": "How long?", "rubric": [{"criterion": "Says so.", "weight": 1}]}
    argv = ["plan", "--policy.model", str(tiny_hf("qwen3")), "--data.train", f'["{data}"]', "--gpus_per_node", "1"]
    argv += ["--output_dir", str(tmp_path / "run"), "--rollout.prompts_per_step", "1"]
    data.write_text(json.dumps(row))
    code, out, err = process.submit(run_cli, argv).result(SLOWEST)
    assert (code, err) == (0, "") and "not there yet" not in out
    data.write_text(json.dumps(row | {"rubric": []}))
    code, _, err = process.submit(run_cli, argv).result(SLOWEST)
    assert code == 2 and "rows.jsonl" in err
    assert not (tmp_path / "run").exists()


def test_suggestions_fit_when_they_are_pasted(process, models, plan):
    """Cheapest first, and each list of options makes a plan that fits and takes as long as it was said to."""
    code, out, err = plan("Qwen3-8B", "Qwen3-30B-A3B", *TWO_NODES, "--suggest", "--json")
    found = json.loads(out)["suggestions"]
    assert (code, err) == (0, "") and len(found) >= 3
    assert [s["step_seconds"] for s in found] == sorted(s["step_seconds"] for s in found)
    for suggestion in (found[0], found[-1]):
        code, out, err = plan("Qwen3-8B", "Qwen3-30B-A3B", *TWO_NODES, *suggestion["options"].split(), "--json")
        assert (code, err) == (0, "")
        assert json.loads(out)["step_seconds"] == pytest.approx(suggestion["step_seconds"])


def test_recompute_trades_memory_for_time(plan):
    """none, selective, full: less memory, more work. The search takes what memory asks for, and no more."""
    updates = []
    for recompute in ("none", "selective", "full"):
        options = ["--policy.layout.tp", "4", "--policy.layout.sp", "--policy.recompute", recompute, "--json"]
        content = json.loads(plan("Qwen3-8B", None, *TWO_NODES, *options)[1])
        (update,) = [phase for phase in content["phases"] if phase["name"] == "update"]
        updates.append((content["memory"][0]["phases"]["update"]["activations"], update["seconds"]))
    (most, first), (between, second), (least, third) = updates
    assert most > 1.5 * between > 1.5 * least and first < second < third
    for memory, kinds in ((79, {"none"}), (26, {"selective", "full"})):
        options = ["--nodes", "1", "--hardware.memory_gib", str(memory), "--suggest", "--json"]
        found = json.loads(plan("Qwen2.5-1.5B", None, *TWO_NODES, *options)[1])["suggestions"]
        chosen = found[0]["options"].split()
        assert chosen[chosen.index("--policy.recompute") + 1] in kinds, (memory, chosen)


def test_rollouts_are_planned_as_they_run(plan):
    """Prompts of a batch are read in one pass, each once for all its responses, whatever their lengths; a batch takes a
    step a token of its responses."""

    def seconds(*options: str) -> float:
        content = json.loads(plan("Qwen3-8B", None, *TWO_NODES, *POLICY_8B, *options, "--json")[1])
        return content["phases"][0]["seconds"]

    # 256 responses on 4 replicas are one batch of 64: 1024 steps, padded to the longest prompt
    even, uneven, others = (seconds(*more) for more in (["--prompt_spread", "0"], [], ["--rollout.batch_size", "32"]))
    assert uneven == even and 15 < even < 60
    assert 1.3 < others / even < 2  # two batches of half as many rows: twice the steps, each reads less of the cache
    many = seconds("--rollout.prompts_per_step", "128", "--rollout.responses_per_prompt", "2")
    assert 1.01 * even < many < 2 * even  # as many responses to more different prompts


@pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed (make vllm)")
def test_vllm_is_planned_as_it_runs(plan):
    """An engine of the whole policy in every rank, with its share of the GPU while it samples; servers take nothing."""

    def planned(*options: str) -> tuple[dict, dict]:
        found = json.loads(plan("Qwen3-8B", None, *TWO_NODES, *POLICY_8B, *options, "--json")[1])
        return found, found["memory"][0]["phases"].get("rollout", {})

    megatron, _ = planned()
    vllm, held = planned("--rollout.engine", "vllm")
    assert held == {"vLLM engine": pytest.approx(0.4 * 79 * 2**30, rel=0.01)}
    assert 0 < vllm["phases"][0]["seconds"] < megatron["phases"][0]["seconds"] and vllm["phases"][0]["tp_bytes"] == 0
    _, held = planned("--rollout.engine", "vllm", "--rollout.vllm.options", "{gpu_memory_utilization: 0.01}")
    assert held["vLLM engine"] == pytest.approx(2 * 8.19e9, rel=0.01)  # its weights alone are more
    found, held = planned(*ON_SERVERS)
    assert held == {} and found["phases"][0]["seconds"] == 0 and any("servers" in note for note in found["notes"])


def test_no_suggestion_for_what_fits_nowhere(plan):
    """235 billion parameters beside a 72 billion policy on one node."""
    code, out, err = plan("Qwen2.5-72B", "Qwen3-235B-A22B", *TWO_NODES, "--nodes", "1", "--suggest")
    assert code == 2 and "--suggest: no layout fits 8 GPUs" in err and out == ""
