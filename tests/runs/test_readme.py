"""The README can be trusted: its commands, its config, its row and its output are taken from README.md and tried.

Short commands are run; a training of GPUs is planned with published configs in the place of its models, and run for one
step with the quickstart's model. A command for which nothing is known here fails. Also: every link between documents
leads somewhere, commands in docs/ have options that exist, and the pictures are what their scripts draw. Leaves out
`make quickstart` (4 minutes) and the submission of jobs (tests/slurm).
"""

import json
import re
import shlex
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from tokenizers import Tokenizer

from distributed import PROCESSES, start_server
from g2r_megatron.config import parsing
from g2r_megatron.config.checks import check_eval_config, check_train_config
from g2r_megatron.config.command_options import EvalConfig, OfflineJudgeConfig, ProbeConfig
from g2r_megatron.config.options import TrainConfig
from g2r_megatron.config.presets import PRESETS, fill_from_preset, resolve_preset
from g2r_megatron.config.serve_checks import check_serve_config
from g2r_megatron.config.serve_options import ServeConfig
from g2r_megatron.plan.config import PlanConfig
from real_runs import PATIENCE, Forked
from scripts import run_main

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
DOCUMENTS += sorted(ROOT.glob("examples/*/README.md")) + sorted(ROOT.glob("benchmarks/results/*.md"))
CONFIGS = {"Qwen2.5-1.5B-Instruct": "Qwen2.5-1.5B", "Qwen3-8B": "Qwen3-8B", "Qwen3-30B-A3B": "Qwen3-30B-A3B"}
CONFIG_CLASSES = {
    "train": TrainConfig,
    "judge": OfflineJudgeConfig,
    "probe": ProbeConfig,
    "eval": EvalConfig,
    "plan": PlanConfig,
    "serve": ServeConfig,
}


def blocks(text: str, language: str) -> list[str]:
    """The fenced blocks of a document that are marked as ``language``."""
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.M | re.S)


def commands(text: str) -> list[list[str]]:
    """The command lines of the bash blocks, as words, without comments."""
    lines = [shlex.split(line, comments=True) for block in blocks(text, "bash") for line in block.splitlines()]
    return [words for words in lines if words]


def command_of(*beginning: str) -> list[str]:
    """The one command of the README that begins so."""
    found = [words for words in commands(README) if words[: len(beginning)] == list(beginning)]
    assert len(found) == 1, f"{' '.join(beginning)}: {len(found)} times in README.md"
    return found[0]


@pytest.fixture
def g2r(tmp_path) -> Callable[[list[str], Path], str]:
    """``g2r(arguments, directory)``: run a g2r command there; what it prints."""

    def run(arguments: list[str], directory: Path) -> str:
        log = tmp_path / "g2r.log"
        log.unlink(missing_ok=True)
        code = Forked(arguments, log, cwd=directory).wait(PATIENCE)
        assert code == 0, log.read_text()
        return log.read_text()

    return run


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A directory as the README's reader has it: my.yaml, rows.jsonl, and models of which only config.json is there."""
    directory = tmp_path_factory.mktemp("readme")
    row = blocks(README, "json")[0]
    assert json.loads(row).keys() == {"id", "prompt", "rubric"}
    for name in ("rows.jsonl", "held_out.jsonl"):
        (directory / name).write_text(row)
    for name, config in CONFIGS.items():
        (directory / "models" / name).mkdir(parents=True)
        shutil.copy(ROOT / "tests" / "real_configs" / f"{config}.json", directory / "models" / name / "config.json")
    (directory / "my.yaml").write_text(with_models(blocks(README, "yaml")[0], directory))
    return directory


def with_models(text: str, place: Path) -> str:
    return text.replace("/models/", f"{place}/models/")


# ---- every command is known here ------------------------------------------------------------------------------------

TRIED_BELOW = (
    ("tools/install_gpu.sh", "--dry-run"), ("g2r", "doctor"), ("g2r", "plan"), ("torchrun",), ("g2r", "report"),
    ("g2r", "judge"), ("g2r", "eval"), ("g2r", "serve"), ("export",), ("sbatch",),
)  # fmt: skip


@pytest.mark.parametrize("words", commands(README), ids=" ".join)
def test_every_command_is_a_target_or_is_tried(words):
    if words[0] == "make":
        done = subprocess.run(["make", "-n", *words[1:]], cwd=ROOT, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
    elif words[0] == "source":
        assert f"VENV := {words[1].removesuffix('/bin/activate')}\n" in (ROOT / "Makefile").read_text()
    elif words[0] == "python":  # half an hour: what it does, test_smollm2.py tries on a small scale
        with pytest.raises(SystemExit) as ended:
            run_main(words[1], [*words[2:], "--help"])
        assert ended.value.code == 0
    else:
        assert any(words[: len(known)] == list(known) for known in TRIED_BELOW), "no test of this command"


def test_install(g2r):
    done = subprocess.run(command_of("tools/install_gpu.sh"), cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "transformer-engine" in done.stdout
    assert "megatron-core" in g2r(command_of("g2r", "doctor")[1:], ROOT)


# ---- training on one's own data -------------------------------------------------------------------------------------


def test_my_yaml_is_ten_lines_and_fits(g2r, place):
    text = blocks(README, "yaml")[0]
    assert len(text.splitlines()) == 10
    assert "step: about" in g2r(command_of("g2r", "plan")[1:], place)


def test_the_torchrun_command_passes_every_check_and_fits(g2r, place, monkeypatch):
    words = command_of("torchrun")
    ranks, options = int(words[words.index("--nproc-per-node") + 1]), words[words.index("train") + 1 :]
    monkeypatch.chdir(place)
    check_train_config(resolve_preset(parsing.parse(TrainConfig, "g2r train", options)), ranks)
    assert "step: about" in g2r(["plan", *options, "--nodes", "1", "--gpus_per_node", str(ranks)], place)


def test_one_step_of_my_yaml_on_the_row_and_its_report(g2r, place):
    """The quickstart's model in the place of the README's; it has no chat template and knows one judge prompt."""
    quickstart = yaml.safe_load((ROOT / "examples/quickstart/config.yaml").read_text())
    g2r(
        [
            *("train", "--config", "my.yaml", "--policy.model", str(ROOT / quickstart["policy"]["model"])),
            *("--judge.template", quickstart["judge"]["template"], "--judge.chat_template", "false"),
            *("--rollout.chat_template", "false", "--rollout.max_response_tokens", "8"),
            *("--rollout.prompts_per_step", "1", "--steps", "1", "--optimizer.warmup_steps", "0"),
        ],
        place,
    )
    run = place / yaml.safe_load(blocks(README, "yaml")[0])["output_dir"]
    assert (run / "hf" / "config.json").is_file()
    assert "mine" in g2r(command_of("g2r", "report")[1:], place)
    evaluations = [str(run / "eval" / f"step_0000000{step}") for step in (0, 1)]
    assert "wins" in g2r([*command_of("g2r", "eval", "compare")[1:3], *evaluations], place)


def test_evaluating_and_serving_pass_every_check(monkeypatch):
    """What they do is tested elsewhere (test_eval_command.py, test_serve.py)."""
    monkeypatch.chdir(ROOT)
    words = command_of("g2r", "eval", "--policy.model")[2:]
    check_eval_config(parsing.parse(EvalConfig, "g2r eval", parsing.with_lists(words, ("data", "responses"))), 1)
    config = parsing.parse(ServeConfig, "g2r serve", command_of("g2r", "serve")[2:])
    config.judge = fill_from_preset(config.judge, PRESETS[config.preset]["judge"])
    check_serve_config(config, 1)
    assert (ROOT / config.judge.model / "config.json").is_file()


# ---- judging a file -------------------------------------------------------------------------------------------------


def rounded(value):
    """``value`` with the digits that the README shows."""
    if isinstance(value, float):
        return round(value, 3)
    if isinstance(value, list):
        return [rounded(item) for item in value]
    return {key: rounded(item) for key, item in value.items()} if isinstance(value, dict) else value


def test_the_judged_row_is_what_the_command_writes(g2r, tmp_path):
    words = command_of("g2r", "judge")[1:]
    words[words.index("--output") + 1] = str(tmp_path / "judged.jsonl")
    g2r(words, ROOT)
    row = json.loads((tmp_path / "judged.jsonl").read_text().splitlines()[-1])
    shown = json.loads(blocks(README, "json")[1])
    assert close(rounded(row), shown)
    query = json.loads((ROOT / "examples/quickstart/data/responses.jsonl").read_text().splitlines()[-1])
    response = query.pop("response")
    assert query == json.loads(blocks(README, "json")[0]) and f'"response": "{response}"' in README


def close(one, other) -> bool:
    """Whether two plain values are the same but for the last digit shown, which another machine may round otherwise."""
    if isinstance(one, float) and isinstance(other, float):
        return abs(one - other) < 0.0021
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(close, one, other))
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(close(one[key], other[key]) for key in one)
    return one == other


# ---- on a cluster ---------------------------------------------------------------------------------------------------


def test_the_job_is_planned_with_the_exported_models(g2r, place):
    """What slurm/train_30b.sh does before it starts a run, with the options of the command."""
    words, exported = command_of("sbatch"), command_of("export")[1:]
    script = next(word for word in words if word.endswith(".sh"))
    slurm, own = words[1 : words.index(script)], words[words.index(script) + 1 :]
    nodes = next(word.removeprefix("--nodes=") for word in slurm if word.startswith("--nodes="))
    subprocess.run(["bash", "-n", script], cwd=ROOT, check=True, timeout=60)
    names = {"POLICY": "--policy.model", "JUDGE": "--judge.model", "DATA": "--data.train"}
    values = dict(with_models(word, place).split("=", 1) for word in exported)
    options = [f"{names[name]}={value}" for name, value in values.items()]
    assert names.keys() == values.keys() and all(f"${{{name}:+" in (ROOT / script).read_text() for name in names)
    config = ["--config", "examples/judge_30b/config.yaml"]
    assert "step: about" in g2r(["plan", *config, *options, *own, "--nodes", nodes], ROOT)


# ---- documents ------------------------------------------------------------------------------------------------------


def anchors(document: Path) -> set[str]:
    """What GitHub calls the headings of a document in links."""
    headings = re.findall(r"^#+ (.*)$", document.read_text(encoding="utf-8"), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(document):
    """Files and headings within the repository; the web is left out."""
    for link in re.findall(r"\]\(([^)\s]+)\)", document.read_text(encoding="utf-8")):
        if link.startswith("http"):
            continue
        name, _, anchor = link.partition("#")
        target = (document.parent / name).resolve() if name else document
        assert target.exists() and target.is_relative_to(ROOT), f"{link}: no such file"
        assert not anchor or anchor in anchors(target), f"{link}: no such heading"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_commands_in_documents_have_options_that_exist(document, place, monkeypatch):
    monkeypatch.chdir(place)
    for words in commands(document.read_text(encoding="utf-8")):
        if words[0] == "torchrun":
            words = ["g2r", *words[words.index("g2r_megatron.cli") + 1 :]]
        if words[0] == "g2r" and words[1] in CONFIG_CLASSES:
            if words[:3] == ["g2r", "eval", "compare"]:
                continue
            options = [str(ROOT / word) if word.startswith("examples/") else word for word in words[2:]]
            options = parsing.with_lists(options, ("data", "responses")) if words[1] == "eval" else options
            parsing.parse(CONFIG_CLASSES[words[1]], f"g2r {words[1]}", options)
        assert words[0] != "python" or (ROOT / words[1]).is_file(), f"{words[1]}: no such script"


def texts_of(picture: Path) -> list[str]:
    return re.findall(r"<text[^>]*>([^<]*)</text>", picture.read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", ["heatmap", "call_path"])
def test_pictures_are_what_their_scripts_draw(name, tmp_path):
    """Their words and numbers; shades may differ by a rounding."""
    script, drawn = ROOT / f"docs/images/draw_{name}.py", tmp_path / "drawn.svg"
    start_server()
    drawing = PROCESSES.Process(target=run_main, args=(str(script.relative_to(ROOT)), ["--output", str(drawn)]))
    drawing.start()
    drawing.join(PATIENCE)
    assert drawing.exitcode == 0
    assert texts_of(drawn) == texts_of(script.with_name(f"{name}.svg"))


def test_the_heat_map_shows_the_tokens_of_the_response():
    tokenizer = Tokenizer.from_file(str(ROOT / "examples/quickstart/model/tokenizer.json"))
    query = json.loads((ROOT / "examples/quickstart/data/responses.jsonl").read_text().splitlines()[0])
    tokens = [tokenizer.decode([i]).strip() for i in tokenizer.encode(query["response"]).ids]
    shown = "|".join(texts_of(ROOT / "docs/images/heatmap.svg"))
    assert "|".join(tokens) in shown and query["prompt"] in shown
