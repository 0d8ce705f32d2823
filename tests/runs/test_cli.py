"""The command line: every option is in --help and in --print_config, overrides win, exit codes are 0, 2 and 130.

Errors are in test_bad_input.py. Leaves out what the commands do.
"""

import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import yaml

from g2r_megatron import cli
from g2r_megatron.cli import main
from g2r_megatron.config import parsing
from g2r_megatron.config.checks import check_train_config
from g2r_megatron.config.command_options import EvalConfig, OfflineJudgeConfig, ProbeConfig
from g2r_megatron.config.help import GUIDES
from g2r_megatron.config.options import TrainConfig
from g2r_megatron.config.presets import resolve_preset
from g2r_megatron.config.ranges import EVAL_RANGES, OFFLINE_JUDGE_RANGES, PROBE_RANGES, SERVE_RANGES, TRAIN_RANGES
from g2r_megatron.config.serve_options import ServeConfig

CLASSES = {"train": TrainConfig, "judge": OfflineJudgeConfig, "probe": ProbeConfig, "serve": ServeConfig}


def output_of(capsys, *argv: str) -> str:
    """What a command line that ends by itself (--help, --print_config) prints."""
    with pytest.raises(SystemExit) as exit_:
        main(list(argv))
    assert exit_.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("command", CLASSES)
def test_help_lists_every_option_with_a_text(command, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    text = output_of(capsys, command, "--help")
    for name in parsing.option_names(CLASSES[command]):
        # the line of an option goes on with its text, or with an indented one
        after = text.partition(f"\n  --{name} ")[2]
        assert after, f"--{name} is not in --help"
        entry = after.partition("\n  --")[0]
        assert len(entry.partition("(type:")[0].split("\n")[-1].strip()) > 5, f"--{name} has no help text: {entry}"


@pytest.mark.parametrize("command", CLASSES)
def test_print_config_is_a_config_file_of_every_option(command, capsys, tmp_path):
    printed = output_of(capsys, command, "--judge.tau", "0.5", "--print_config")
    assert yaml.safe_load(printed)["judge"]["tau"] == 0.5
    (tmp_path / "config.yaml").write_text(printed)
    again = parsing.parse(CLASSES[command], "g2r", ["--config", str(tmp_path / "config.yaml")])
    expected = CLASSES[command]()
    expected.judge.tau = 0.5
    assert again == expected


def test_the_defaults_of_the_command_line_are_those_of_the_dataclasses():
    assert parsing.parse(TrainConfig, "g2r train", []) == TrainConfig()
    assert parsing.parse(OfflineJudgeConfig, "g2r judge", []) == OfflineJudgeConfig()


def test_later_options_override_the_file(tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text(
        "steps: 7\npolicy:\n  layout: {tp: 2, sp: true}\noptimizer:\n  lr: 1e-4\ndata:\n  train: [a.jsonl]\n"
    )
    config = parsing.parse(
        TrainConfig,
        "g2r train",
        ["--config", str(file), "--policy.layout.tp", "4", "--grpo.weight_clip=[0.5, 2]", "--data.train", "[b.jsonl]"],
    )
    assert (config.steps, config.optimizer.lr) == (7, 1e-4)
    assert (config.policy.layout.tp, config.policy.layout.sp, config.policy.layout.pp) == (4, True, 1)
    assert config.grpo.weight_clip == [0.5, 2.0] and config.data.train == ["b.jsonl"]


@pytest.mark.parametrize(
    "argv",
    [
        ["--dump-inputs"],
        ["--dump_inputs"],
        ["--dump-inputs", "--seed", "3"],
        ["--dump-inputs=true"],
        ["--dump_inputs", "true"],
    ],
)
def test_a_switch_needs_no_value_and_dashes_are_underscores(argv):
    assert parsing.parse(OfflineJudgeConfig, "g2r judge", argv).dump_inputs is True


def test_what_is_written_can_be_in_the_home_directory(monkeypatch, tmp_path):
    """A YAML file, or --name=~/x, meets no shell that would expand it."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "x.yaml").write_text("output_dir: ~/runs/a")
    assert (
        parsing.parse(TrainConfig, "g2r train", ["--config", f"{tmp_path}/x.yaml"]).output_dir == f"{tmp_path}/runs/a"
    )
    assert parsing.parse(OfflineJudgeConfig, "g2r judge", ["--output=~/j.jsonl"]).output == f"{tmp_path}/j.jsonl"


def test_every_number_has_a_range():
    """A new numeric option must be given its range; layouts have their own check, and options of training are refused."""
    of_training = {"rollout.prompts_per_step", "rollout.responses_per_prompt"}
    classes = (
        (TrainConfig, TRAIN_RANGES, set()),
        (OfflineJudgeConfig, OFFLINE_JUDGE_RANGES, set()),
        (ProbeConfig, PROBE_RANGES, of_training),
        (EvalConfig, EVAL_RANGES, of_training),
        (ServeConfig, SERVE_RANGES, set()),
    )
    for config_class, ranges, refused in classes:
        numbers = {
            name
            for name in parsing.option_names(config_class)
            if parsing.type_of(config_class, name) in (int, float, int | None, float | None) and ".layout." not in name
        }
        assert numbers - refused == set(ranges)


@pytest.mark.parametrize("preset", ["grpo", "paper", "robust"])
def test_presets_with_defaults_pass_the_checks(preset, tmp_path):
    config = TrainConfig(output_dir=str(tmp_path / "run"))
    config.policy.model, config.data.train, config.grpo.preset = "model", ["train.jsonl"], preset
    resolved = resolve_preset(config)
    check_train_config(resolved, world_size=8)
    assert [name for name, value in asdict(resolved.grpo).items() if value is None] == ["weight_clip"]
    assert not (tmp_path / "run").exists()


def test_general_help(capsys):
    assert main(["--help"]) == 0
    out = capsys.readouterr().out
    assert all(command in out for command in cli.COMMANDS)


def test_no_command_at_all_shows_the_usage_and_is_2(capsys):
    assert main([]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err == cli.USAGE


@pytest.mark.parametrize("prog", GUIDES)
def test_help_begins_with_the_next_steps_and_the_common_options(prog, capsys, monkeypatch):
    """In this order: usage, next steps, common options, everything else; no option is listed twice or lost."""
    monkeypatch.setenv("COLUMNS", "200")
    text, guide = output_of(capsys, prog.split()[1], "--help"), GUIDES[prog]
    assert text.startswith(f"usage: {guide.usage}\n\n{guide.start}\n\ncommon options:\n")
    common = text.partition("\n\nfurther options of the run:\n")[0]
    assert all(f"\n  --{name} " in common for name in guide.common)
    assert all(text.count(f"\n  --{name} ") == 1 for name in guide.common)
    assert "\njudge.layout: How one model" in text


def test_interrupted_is_130(monkeypatch):
    def interrupted(argv):
        raise KeyboardInterrupt

    monkeypatch.setitem(cli.COMMANDS, "train", interrupted)
    assert main(["train"]) == 130


def test_help_and_mistakes_do_not_import_torch():
    code = (
        "import sys; from g2r_megatron.cli import main; main(['train', '--steps', '2']); print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout == "False\n"
    assert done.stderr.startswith("g2r: error: policy.model: missing")


@pytest.mark.parametrize("rank_that_fails", ["all", "2"])
def test_under_torchrun_one_rank_reports_and_all_end(rank_that_fails, tmp_path):
    """Also when one rank alone finds the mistake, while the others wait for it in a collective."""
    script = tmp_path / "ranks.py"
    script.write_text(
        "import os, sys\n"
        "from g2r_megatron import cli\n"
        "from g2r_megatron.records import failures\n"
        "from g2r_megatron.errors import UserError\n"
        "def command(argv):\n"
        f"    if '{rank_that_fails}' in ('all', os.environ['RANK']):\n"
        "        raise UserError('file', 'broken', 'restore it')\n"
        "    import torch.distributed as dist\n"
        "    dist.init_process_group('gloo')\n"
        "    dist.barrier()\n"
        "cli.COMMANDS['train'] = command\n"
        "failures.GRACE_SECONDS = 1.0 if '2' == sys.argv[1] else 30.0\n"
        "sys.exit(cli.main(['train']))\n"
    )
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "3"]
    done = subprocess.run(
        [*torchrun, str(script), rank_that_fails],
        capture_output=True, text=True, timeout=400, env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )  # fmt: skip
    assert done.returncode != 0
    assert done.stderr.count("g2r: error: file: broken; restore it\n") == 1
    assert done.stderr.count("exitcode  : 2") == (3 if rank_that_fails == "all" else 1)


def test_old_names_of_options_are_accepted_with_one_warning_each(tmp_path, capsys):
    """On the command line and in a config file, old values and removed options included; the rest stays, later options win."""
    file = tmp_path / "old.yaml"
    file.write_text("judge: {pool: sentence, pooling: response, tau: 0.5}\nsteps: 3\n")
    config = parsing.parse(TrainConfig, "g2r train", ["--config", str(file), "--judge.pool", "none"])
    assert (config.judge.smoothing, config.judge.credit, config.judge.tau, config.steps) == (
        "none",
        "per_response",
        0.5,
        3,
    )
    warnings = capsys.readouterr().err.splitlines()
    assert sorted(warnings) == [
        "warning: judge.pool is called judge.smoothing now",
        "warning: judge.pooling is called judge.credit now",
    ]
    file.write_text("eval_every: 5\neval_greedy: true\ndata: {train: [a], eval: [b, c]}\n")
    config = parsing.parse(TrainConfig, "g2r train", ["--config", str(file), "--eval_responses", "3"])
    held_out = config.eval
    assert (held_out.every, held_out.greedy, held_out.data, held_out.samples) == (5, True, ["b", "c"], 3)
    assert config.data.train == ["a"] and capsys.readouterr().err.count("is called eval.") == 4
    file.write_text("judge: {sentence_delimiters: '.', tau: 0.5}\nsteps: 3\n")
    config = parsing.parse(
        TrainConfig, "g2r train", ["--config", str(file), "--judge.sentence_delimiters", ";", "--steps", "4"]
    )
    assert (config.judge.tau, config.steps) == (0.5, 4)
    assert capsys.readouterr().err.startswith("warning: judge.sentence_delimiters has no effect any more: ")
    file.write_text("judge: {pool: sentence, pooling: response, tau: 0.5}\n")
    config = parsing.parse(TrainConfig, "g2r train", [f"--config={file}", "--judge.pooling=item"])
    assert (config.judge.smoothing, config.judge.credit) == ("sentence", "per_item")
