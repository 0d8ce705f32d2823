"""Bad input: exit code 2, one line on stderr that names option or file, value and remedy, and nothing written.

Each case breaks one thing of a command line that works (test_cli.py, test_offline_judge.py). They run in this process,
those with broken weights in a world of one. Leaves out mistakes that only a training step can find.
"""

import io
import json
import shutil
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from g2r_megatron.cli import main

ITEM = {"criterion": "Advises rest", "weight": 3}
ROW = {"id": "r1", "prompt": "What helps with fever?", "rubric": [ITEM], "response": "Rest."}


def run(argv: list[str]) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of a command line."""
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        code = main(argv)
    return code, out.getvalue(), err.getvalue()


def assert_refused(result: tuple[int, str, str], *said: str) -> None:
    """Exit code 2 and one line in which every text of ``said`` occurs, with a remedy after the last ``;``."""
    code, out, err = result
    assert (code, out) == (2, "")
    assert err.startswith("g2r: error: ") and err.count("\n") == 1 and err.endswith("\n"), err
    for text in said:
        assert text in err
    assert len(err.rpartition("; ")[2]) > 8, f"no remedy: {err}"


# ---- options of g2r train -------------------------------------------------------------------------------------------

OPTIONS = [
    # (options, what the line must say)
    (["--stepz", "3"], ["stepz", "no such option", "did you mean steps"]),
    (["--tp", "2"], ["tp", "policy.layout.tp or judge.layout.tp"]),
    (["--steps", "many"], ["steps", "'many'", "whole number"]),
    (["--steps"], ["steps", "no value"]),
    (["--steps", "0"], ["steps", "0", "at least 1"]),
    (["--seed", "-1"], ["seed", "-1", "at least 0"]),
    (["stray"], ["'stray'", "--name value"]),
    (["--data.train", "a.jsonl"], ["data.train", "a.jsonl", "a list"]),
    (["--data.train", "[]"], ["data.train", "missing", "jsonl"]),
    (["--policy.model", ""], ["policy.model", "missing"]),
    (["--output_dir", ""], ["output_dir", "missing"]),
    (["--grpo.preset", "best"], ["grpo.preset", "'best'", "robust, paper, grpo"]),
    (["--grpo.advantage", "tokens"], ["grpo.advantage", "'tokens'", "itemwise"]),
    (["--grpo.mix", "1.5"], ["grpo.mix", "1.5", "at most 1"]),
    (["--grpo.mix_anneal", "-0.1"], ["grpo.mix_anneal", "-0.1", "at least 0"]),
    (["--grpo.weight_clip", "[2.0, 0.5]"], ["grpo.weight_clip", "[2.0, 0.5]", "low <= 1 <= high"]),
    (["--grpo.weight_clip", "[0.5]"], ["grpo.weight_clip", "[0.5]", "[low, high]"]),
    (["--grpo.top_items", "0"], ["grpo.top_items", "0", "more than 0"]),
    (["--grpo.clip_low", "1"], ["grpo.clip_low", "1", "less than 1"]),
    (["--grpo.clip_high", "0"], ["grpo.clip_high", "0", "more than 0"]),
    (["--grpo.kl_coef", "-1"], ["grpo.kl_coef", "-1", "at least 0"]),
    (["--grpo.mini_batches", "1000"], ["grpo.mini_batches", "1000", "256 responses"]),
    (["--grpo.mini_batches", "6"], ["grpo.mini_batches", "6", "divide the 256 responses"]),
    (
        ["--eval.greedy", "true", "--eval.samples", "4", "--eval.data", '["b.jsonl"]'],
        ["eval.samples", "4 with eval.greedy", "all the same"],
    ),
    (["--data.fields", "prompt"], ["data.fields", "prompt"]),
    (["--data.on_bad_row", "ignore"], ["data.on_bad_row", "'ignore'", "refuse, skip"]),
    (["--rollout.responses_per_prompt", "1"], ["rollout.responses_per_prompt", "1", "at least 2"]),
    (
        ["--rollout.responses_per_prompt", "1", "--grpo.baseline", "rloo"],
        ["responses_per_prompt", "rloo", "at least 2"],
    ),
    (["--rollout.temperature", "-1"], ["rollout.temperature", "-1", "at least 0"]),
    (["--rollout.temperature", "0"], ["rollout.temperature", "0", "all the same"]),
    (["--rollout.top_p", "0"], ["rollout.top_p", "0", "more than 0"]),
    (["--rollout.top_k", "-5"], ["rollout.top_k", "-5", "at least 0"]),
    (["--rollout.max_response_tokens", "0"], ["rollout.max_response_tokens", "0", "at least 1"]),
    (["--judge.tau", "0"], ["judge.tau", "0", "more than 0"]),
    (["--judge.tau", ".inf"], ["judge.tau", "inf", "more than 0"]),
    (["--judge.tau", ".nan"], ["judge.tau", "nan", "more than 0"]),
    (["--judge.contraction", "2"], ["judge.contraction", "2", "at most 1"]),
    (["--judge.smear_gamma", "1"], ["judge.smear_gamma", "1", "less than 1"]),
    (["--judge.template", "{conversation} {response}"], ["judge.template", "{criterion} 0 times", "once"]),
    (["--judge.true_words", "[]"], ["judge.true_words", "missing", "spelling"]),
    (["--judge.true_words", "[Met]", "--judge.false_words", "[Met]"], ["judge.true_words", "Met", "differ"]),
    (["--judge.true_words", "[yes]"], ["judge.true_words", "'True'", "quoted"]),  # YAML's boolean
    (["--judge.attribution", "uniform", "--judge.shuffle"], ["judge.shuffle", "all tokens weigh the same"]),
    (
        ["--judge.attribution", "occlusion", "--judge.credit", "per_response"],
        ["judge.credit", "per_response with judge.attribution occlusion", "per_item"],
    ),
    (["--judge.attribution", "gate", "--judge.gate_levels", "[]"], ["judge.gate_levels", "[]", "at least one"]),
    (["--judge.attribution", "gate", "--judge.gate_levels", "[1, 0]"], ["judge.gate_levels", "0.0]", "more than 0"]),
    (["--judge.attribution", "gate", "--judge.gate_levels", "[1.5]"], ["judge.gate_levels", "[1.5]", "at most 1"]),
    (["--judge.attribution", "gate", "--judge.gate_queries", "some"], ["judge.gate_queries", "'some'", "branch, all"]),
    (
        ["--judge.gate_queries", "all", "--judge.attribution", "contracted"],
        ["judge.gate_queries", "all with judge.attribution contracted", "=gate"],
    ),
    (
        ["--judge.gate_levels", "[0.5]", "--judge.attribution", "contracted"],
        ["judge.gate_levels", "[0.5] with judge.attribution contracted", "=gate"],
    ),
    (["--optimizer.lr=-1e-6"], ["optimizer.lr", "-1e-06", "more than 0"]),
    (["--optimizer.min_lr", "1"], ["optimizer.min_lr", "1", "optimizer.lr"]),
    (["--optimizer.warmup_steps", "100"], ["optimizer.warmup_steps", "100", "less than steps"]),
    (["--eval.every", "5"], ["eval.every", "5", "eval.data"]),
    (["--checkpoint.keep_last", "0"], ["checkpoint.keep_last", "0", "at least 1"]),
    (["--policy.micro_batch_tokens", "0"], ["policy.micro_batch_tokens", "0", "at least 1"]),
    (["--policy.layout.tp", "2"], ["policy.layout.tp", "2 x 1 x 1 = 2 ranks", "start 2 processes"]),
    (["--judge.layout.pp", "3"], ["judge.layout.tp x judge.layout.cp x judge.layout.pp", "3 ranks", "world of 1"]),
    (["--policy.layout.tp", "0"], ["policy.layout.tp", "0", "at least 1"]),
    (["--policy.layout.sp", "true"], ["policy.layout.sp", "tp 1", "tp 2"]),
    (["--judge.layout.ep", "2"], ["judge.layout.ep", "2 ranks", "one of [1]"]),
    (["--policy.layout.cp", "2"], ["policy.layout.cp: 2", "only judge.layout.cp"]),
    (["--policy.layout.vpp", "2"], ["policy.layout.vpp", "2 with pp 1", "pp of 3"]),
]


@pytest.mark.parametrize(("wrong", "said"), OPTIONS, ids=[" ".join(wrong)[:50] for wrong, _ in OPTIONS])
def test_option(wrong, said, tmp_path):
    argv = ["train", "--policy.model", "m", "--data.train", "[a.jsonl]", "--output_dir", str(tmp_path / "run"), *wrong]
    assert_refused(run(argv), *said)
    assert not list(tmp_path.iterdir())


def test_package_that_is_not_installed(tmp_path, monkeypatch):
    monkeypatch.setattr("g2r_megatron.config.checks.find_spec", lambda name: None)
    argv = ["train", "--policy.model", "m", "--data.train", "[a.jsonl]", "--output_dir", str(tmp_path / "run")]
    assert_refused(
        run([*argv, "--log.wandb", "--log.tensorboard", "false"]), "log.wandb", "not installed", "pip install"
    )
    assert not list(tmp_path.iterdir())


def test_output_dir_that_is_a_file(tmp_path):
    (tmp_path / "run").write_text("keep")
    argv = ["train", "--policy.model", "m", "--data.train", "[a.jsonl]", "--output_dir", str(tmp_path / "run/1")]
    assert_refused(run(argv), "output_dir", "is a file", "give a directory")
    assert (tmp_path / "run").read_text() == "keep"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"steps: [1\n", ["config.yaml:2", "not YAML"]),
        (b"- 1\n", ["config.yaml", "[1]", "option: value"]),
        (b"", ["config.yaml", "None"]),
        (b"\xff\xfe", ["config.yaml", "UTF-8"]),
        (b"steps: 1\nsteps: 2\n", ["config.yaml:2", "'steps'", "twice"]),
        (b"grpo:\nsteps: 1\n", ["config.yaml", "grpo", "no value"]),
        (b"grpo:\n  presett: paper\n", ["grpo.presett", "no such option", "grpo.preset"]),
        (b"grpo: paper\n", ["grpo", "'paper'", "section"]),
        (b"optimizer:\n  lr: fast\n", ["optimizer.lr", "'fast'", "a number"]),
        (b"data:\n  shuffle: maybe\n", ["data.shuffle", "'maybe'", "true or false"]),
    ],
)
def test_config_file(content, said, tmp_path):
    (tmp_path / "config.yaml").write_bytes(content)
    assert_refused(run(["train", "--config", str(tmp_path / "config.yaml")]), *said)
    assert [file.name for file in tmp_path.iterdir()] == ["config.yaml"]


def test_config_file_that_is_missing():
    assert_refused(run(["train", "--config", "/nowhere.yaml"]), "--config", "/nowhere.yaml", "existing YAML")


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["train"], ["policy.model, data.train, output_dir", "g2r train --print_config > my.yaml"]),
        (["judge"], ["judge.model, input, output", "g2r judge --help"]),
        (["probe"], ["judge.model, input, output", "g2r probe --help"]),
        (["plan"], ["policy.model", "g2r plan --config my.yaml --nodes 2"]),
        (["trian"], ["command", "'trian'", "train"]),
        (["report"], ["RUN_DIR", "g2r report --help"]),
        (["report", "/nowhere"], ["/nowhere", "no such run directory"]),
    ],
)
def test_command(argv, said):
    assert_refused(run(argv), *said)


# ---- g2r judge: rows, files, tokenizers, checkpoints ----------------------------------------------------------------


@dataclass
class Case:
    """A working ``g2r judge`` command line in a directory of its own, to be broken."""

    directory: Path
    model: Path

    @property
    def rows(self) -> Path:
        return self.directory / "rows.jsonl"

    def write_rows(self, *rows: dict | str) -> None:
        lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
        self.rows.write_text("".join(line + "\n" for line in lines))

    def argv(self, *options: str) -> list[str]:
        paths = ["--judge.model", self.model, "--input", self.rows, "--output", self.directory / "out.jsonl"]
        return ["judge", *map(str, paths), *options]

    def edit_json(self, name: str, **values) -> None:
        file = self.model / name
        file.write_text(json.dumps({**json.loads(file.read_text()), **values}))

    def edit_weights(self, edit: Callable[[dict[str, torch.Tensor]], None]) -> None:
        weights = load_file(self.model / "model.safetensors")
        edit(weights)
        save_file(weights, self.model / "model.safetensors", metadata={"format": "pt"})


@pytest.fixture
def case(tmp_path, tiny_hf) -> Case:
    shutil.copytree(tiny_hf("qwen3"), tmp_path / "model")
    case = Case(tmp_path, tmp_path / "model")
    case.write_rows(ROW)
    return case


ROWS = [
    # (lines, what the message must say)
    (["{'id': 1}"], ["rows.jsonl:1", "not JSON"]),
    ([ROW, "[1]"], ["rows.jsonl:2", "not an object"]),
    ([], ["rows.jsonl", "no rows"]),
    ([{"text": "a"}], ["rows.jsonl:1", "['text']", "hold no conversation"]),
    ([{"custom_id": "7", "response": {"body": {"choices": []}}}], ["rows.jsonl:1", "hold no conversation", "queries"]),
    ([{k: v for k, v in ROW.items() if k != "response"}], ["rows.jsonl:1", "hold no response"]),
    ([{**ROW, "response": 3}], ["rows.jsonl:1", "response is 3", "text"]),
    ([{**ROW, "prompt": []}], ["rows.jsonl:1", "prompt is []"]),
    ([{**ROW, "prompt": [{"role": "robot", "content": "a"}]}], ["prompt[0].role is 'robot'", "system, user"]),
    ([{**ROW, "prompt": [{"role": "assistant", "content": "a"}]}], ["prompt[0]", "assistant", "last message"]),
    ([{**ROW, "rubric": []}], ["rows.jsonl:1", "rubric is []"]),
    ([{**ROW, "rubric": [{**ITEM, "weight": "much"}]}], ["rubric[0].weight is 'much'", "finite number"]),
    ([{**ROW, "rubric": [{**ITEM, "weight": "Pitfall"}]}], ["rubric[0].weight is 'Pitfall'", "polarity"]),
    ([{**ROW, "rubric": [{**ITEM, "weight": float("nan")}]}], ["rubric[0].weight is nan", "finite number"]),
    ([{**ROW, "rubric": [{**ITEM, "weight": -3}]}], ["rows.jsonl:1", "positive weight"]),
    ([{**ROW, "rubric": [{**ITEM, "check": "("}]}], ["rubric[0].check is '('", "regular expression"]),
    ([ROW, {**ROW, "rubric": []}], ["rows.jsonl:2", "1 of 2 rows is bad", "on_bad_row"]),
]


@pytest.mark.parametrize(("lines", "said"), ROWS)
def test_row(lines, said, case):
    case.write_rows(*lines)
    assert_refused(run(case.argv()), *said)
    assert not (case.directory / "out.jsonl").exists()


FILES = {
    "the input is missing": (lambda case: case.rows.unlink(), [], ["rows.jsonl", "no such file"]),
    "the input has another extension": (None, ["--input", __file__], ["test_bad_input.py", "'.py'", ".jsonl"]),
    "the output exists": (lambda case: (case.directory / "out.jsonl").touch(), [], ["output", "exists", "new file"]),
    "the output has no directory": (None, ["--output", "/nowhere/out.jsonl"], ["output", "/nowhere", "create"]),
    "no judge": (None, ["--judge.model", "null"], ["judge.model", "missing"]),
    "the judge is no directory": (None, ["--judge.model", "/nowhere"], ["judge.model", "/nowhere", "directory"]),
    "another format": (None, ["--format", "healthbench"], ["healthbench", "g2r", "auto"]),
    "a judge input is too long": (None, ["--judge.max_length", "20"], ["judge.max_length", "'r1'", "20"]),
    "a verdict of several tokens": (None, ["--judge.true_words", "[Affirmative]"], ["judge.true_words", "Affirmative"]),
    "gates of an empty branch": (
        None,
        [
            *("--judge.attribution", "gate", "--judge.chat_template", "false"),
            *("--judge.template", "{criterion} {conversation} {response}"),
        ],
        ["judge.gate_queries", "branch, but judge.template ends with the response", "another value"],
    ),
    "batch_rows 0": (None, ["--batch_rows", "0"], ["batch_rows", "0", "at least 1"]),
    "a layout for more ranks": (None, ["--judge.layout.tp", "2"], ["judge.layout", "2 ranks", "start 2 processes"]),
    "a shard too many": (None, ["--shards", "2", "--shard", "2"], ["shard", "2 of 2", "from 0"]),
    "more shards than rows": (None, ["--shards", "2"], ["shards", "2 for 1 rows", "at most"]),
    "parts of other shards": (
        lambda case: (
            (case.directory / "out.jsonl.parts").mkdir(),
            (case.directory / "out.jsonl.parts/00001-of-00003.jsonl").touch(),
        ),
        ["--shards", "2"],
        ["shards", "holds parts of 3", "remove"],
    ),
}
TOKENIZERS = {
    "no tokenizer": (
        lambda case: [(case.model / name).unlink() for name in ("tokenizer.json", "tokenizer_config.json")],
        [],
        ["model has no tokenizer files", "tokenizer.json"],
    ),
    "a broken tokenizer": (
        lambda case: (case.model / "tokenizer.json").write_text("{"),
        [],
        ["tokenizer", "cannot be read", "save_pretrained"],
    ),
    "no chat template": (
        lambda case: (case.model / "chat_template.jinja").unlink(),
        [],
        ["judge.chat_template", "no chat template", "false"],
    ),
    "a tokenizer larger than the model": (
        lambda case: case.edit_json("config.json", vocab_size=300),
        [],
        ["judge.model", "383 tokens", "300"],
    ),
}
CONFIGS = {
    "no config.json": (lambda case: (case.model / "config.json").unlink(), [], ["judge.model", "no config.json"]),
    "a broken config.json": (
        lambda case: (case.model / "config.json").write_text("{"),
        [],
        ["config.json", "not readable as JSON", "restore"],
    ),
    "another family": (
        lambda case: case.edit_json("config.json", model_type="gpt2"),
        [],
        ["model_type", "'gpt2'", "qwen3"],
    ),
    "a quantized model": (
        lambda case: case.edit_json("config.json", quantization_config={"quant_method": "fp8"}),
        [],
        ["quantization_config", "dequantize"],
    ),
    "attention biases": (
        lambda case: case.edit_json("config.json", attention_bias=True),
        [],
        ["attention_bias", "True", "False"],
    ),
    "an unknown field": (
        lambda case: case.edit_json("config.json", attn_logit_softcapping=50.0),
        [],
        ["attn_logit_softcapping", "50.0", "not a field of"],
    ),
    "another architecture": (
        lambda case: case.edit_json("config.json", architectures=["LlamaForSequenceClassification"]),
        [],
        ["architectures", "LlamaForSequenceClassification", "ForCausalLM"],
    ),
}
BEFORE_WEIGHTS = {**FILES, **TOKENIZERS, **CONFIGS}


@pytest.mark.parametrize("name", BEFORE_WEIGHTS)
def test_judge_before_weights_are_read(name, case):
    break_, options, said = BEFORE_WEIGHTS[name]
    if break_ is not None:
        break_(case)
    before = sorted(case.directory.iterdir())
    assert_refused(run(case.argv(*options)), *said)
    assert sorted(case.directory.iterdir()) == before


WEIGHTS = {
    "no weights": (
        lambda case: (case.model / "model.safetensors").unlink(),
        ["neither model.safetensors", "safetensors files"],
    ),
    "only pickles": (
        lambda case: (case.model / "model.safetensors").rename(case.model / "pytorch_model.bin"),
        ["pickle", "pytorch_model.bin", "safe"],
    ),
    "a torn file": (
        lambda case: (case.model / "model.safetensors").write_bytes(b"torn"),
        ["model.safetensors", "only 4 bytes", "again"],
    ),
    "a missing shard": (
        lambda case: (
            (case.model / "model.safetensors").unlink(),
            (case.model / "model.safetensors.index.json").write_text('{"weight_map": {"a": "b.safetensors"}}'),
        ),
        ["index.json", "b.safetensors", "restore"],
    ),
    "a missing tensor": (
        lambda case: case.edit_weights(lambda weights: weights.pop("model.norm.weight")),
        ["model.norm.weight is missing", "config.json"],
    ),
    "an unknown tensor": (
        lambda case: case.edit_weights(lambda weights: weights.update(extra=torch.zeros(1))),
        ["unknown tensor extra", "not part of"],
    ),
    "a tensor of another shape": (
        lambda case: case.edit_weights(lambda weights: weights.update({"model.norm.weight": torch.zeros(3)})),
        ["model.norm.weight", "shape (3,)", "(64,)"],
    ),
    "a quantized tensor": (
        lambda case: case.edit_weights(
            lambda weights: weights.update({"model.norm.weight": torch.zeros(64, dtype=torch.int8)})
        ),
        ["model.norm.weight", "dtype I8", "BF16"],
    ),
}


@pytest.mark.parametrize("name", WEIGHTS)
def test_judge_checkpoint(name, case, worlds):
    break_, said = WEIGHTS[name]
    break_(case)
    [result] = worlds[1].run(run, case.argv())
    assert_refused(result, *said)
    assert not (case.directory / "out.jsonl").exists() and not list(case.directory.glob(".*"))


def test_fp8_without_a_gpu(case, worlds):
    [result] = worlds[1].run(run, case.argv("--judge.precision.fp8", "tensorwise", "--judge.precision.dtype", "bf16"))
    assert_refused(result, "judge.precision.fp8", "tensorwise", "none")


def test_layout_that_does_not_divide_the_model(case, worlds):
    """The tiny model has 4 layers and 2 key-value heads."""
    results = worlds[3].run(run, case.argv("--judge.layout.pp", "3"))
    assert_refused(results[0], "judge.layout.pp", "3", "4 layers", "one of [1, 2, 4]")
    assert [code for code, _, _ in results] == [2, 2, 2]
