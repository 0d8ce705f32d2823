"""An option that is set and does nothing beside the others is named, with what it needs; others are not.

Leaves out options whose value cannot work at all, which are refused (test_bad_input.py).
"""

import pytest

from g2r_megatron.config import parsing
from g2r_megatron.config.checks import check_train_config
from g2r_megatron.config.options import GrpoConfig, TrainConfig
from g2r_megatron.config.presets import resolve_preset
from g2r_megatron.config.unused import warn_of_unused
from g2r_megatron.errors import UserError

UNUSED = [
    (["--grpo.false_scale", "0.5", "--grpo.preset", "paper"], "grpo.false_scale", "itemwise"),
    (["--grpo.top_items", "0.5", "--grpo.preset", "grpo"], "grpo.top_items", "grpo.mix"),
    (["--grpo.kl_estimator", "k1"], "grpo.kl_estimator", "grpo.kl_coef"),
    (["--judge.contraction", "0.5", "--grpo.preset", "paper"], "judge.contraction", "contracted"),
    (["--judge.smear_gamma", "0.5", "--judge.smoothing", "none"], "judge.smear_gamma", "smear"),
    (["--judge.tau", "0.5", "--judge.normalize", "positive"], "judge.tau", "softmax"),
    (["--optimizer.min_lr", "1e-9"], "optimizer.min_lr", "decay"),
    (["--eval.greedy", "true"], "eval.greedy", "eval.data"),
    (["--judge.shuffle", "true", "--grpo.preset", "grpo"], "judge.shuffle", "grpo.mix"),
    (["--judge.attribution", "l2", "--grpo.preset", "grpo"], "judge.attribution", "grpo.mix"),
    (["--judge.credit", "per_response", "--grpo.mix", "0"], "judge.credit", "grpo.mix"),
    (["--judge.target", "log_prob", "--judge.attribution", "attention"], "judge.target", "other than attention"),
    (["--alarms.faithless", "0.1", "--grpo.preset", "grpo"], "alarms.faithless", "grpo.mix"),
    (["--judge.think", "refuse", "--judge.chat_template", "false"], "judge.think", "judge.chat_template"),
    (["--log.wandb_project", "mine"], "log.wandb_project", "log.wandb"),
]


# options whose effect can never come: refused (config/alarm_checks.py, config/checks.py)
NEVER = [
    (
        ["--alarms.stop_on", "[master_keys]", "--alarms.every", "0"],
        "alarms.stop_on: master_keys, but alarms.every is 0",
    ),
    (["--alarms.stop_on", "[gold_down]"], "alarms.stop_on: gold_down, but there is no eval.data"),
    (["--alarms.stop_on", "[faithless]", "--grpo.preset", "grpo"], "alarms.stop_on: faithless, but no token credit"),
    (["--alarms.stop_on", "[length]", "--steps", "19"], "alarms.stop_on: length, but steps 19 are fewer than two"),
    (["--alarms.on_faithless", "grpo", "--grpo.preset", "grpo"], "alarms.on_faithless: grpo, but no token credit"),
    (
        ["--alarms.on_faithless", "grpo", "--alarms.faithless", "null"],
        "alarms.on_faithless: grpo, but alarms.faithless",
    ),
    (["--judge.true_words", '["True", " "]'], "judge.true_words: .*blank word"),
]


@pytest.mark.parametrize(("arguments", "found"), NEVER)
def test_an_option_that_can_never_act_is_refused(arguments, found, tmp_path):
    needed = ["--policy.model", "m", "--data.train", '["a"]', "--output_dir", str(tmp_path)]
    config = resolve_preset(parsing.parse(TrainConfig, "g2r train", [*needed, *arguments]))
    with pytest.raises(UserError, match=found):
        check_train_config(config, 1)


def warnings_of(arguments: list[str], capsys) -> list[str]:
    config = resolve_preset(parsing.parse(TrainConfig, "g2r train", arguments))
    warn_of_unused(config, resolve_preset(TrainConfig(grpo=GrpoConfig(preset=config.grpo.preset))))
    return capsys.readouterr().err.splitlines()


@pytest.mark.parametrize(("arguments", "option", "needed"), UNUSED)
def test_an_option_without_effect_is_named(arguments, option, needed, capsys):
    (line,) = warnings_of(arguments, capsys)
    assert option in line and "has no effect" in line and needed in line


def test_options_with_an_effect_are_not(capsys):
    assert (
        warnings_of(
            [
                "--judge.normalize",
                "softmax",
                "--judge.tau",
                "0.5",
                "--grpo.kl_coef",
                "0.1",
                "--grpo.kl_estimator",
                "k1",
            ],
            capsys,
        )
        == []
    )
