"""Options that do nothing beside the others: whoever sets one of them means something by it, so a warning names it."""

from collections.abc import Callable
from operator import attrgetter
from typing import Any

from g2r_megatron.config.command_options import OfflineJudgeConfig
from g2r_megatron.config.options import TrainConfig
from g2r_megatron.config.serve_options import ServeConfig
from g2r_megatron.errors import warn

DENSE = "grpo.mix more than 0 and a grpo.advantage other than sequence"
VLLM = "rollout.engine=vllm, and no rollout.replay"
# option -> (whether it has an effect, given the sections that it depends on; what it needs)
OF_JUDGE: dict[str, tuple[Callable[[Any], bool], str]] = {
    "judge.contraction": (lambda c: c.judge.attribution == "contracted", "judge.attribution=contracted"),
    "judge.tau": (
        lambda c: c.judge.normalize == "softmax" and c.judge.attribution != "uniform",
        "judge.normalize=softmax and a judge.attribution other than uniform",
    ),
    "judge.target": (
        lambda c: c.judge.attribution not in ("attention", "uniform"),
        "a judge.attribution other than attention and uniform",
    ),
    "judge.normalize": (lambda c: c.judge.attribution != "uniform", "a judge.attribution other than uniform"),
    "judge.standardize": (
        lambda c: c.judge.normalize == "softmax" or not c.judge.standardize,
        "judge.normalize=softmax",
    ),
    "judge.think": (lambda c: c.judge.chat_template, "judge.chat_template"),
    "judge.smear_gamma": (lambda c: c.judge.smoothing == "smear", "judge.smoothing=smear"),
}
OF_TRAINING: dict[str, tuple[Callable[[Any], bool], str]] = {
    **OF_JUDGE,
    "grpo.return_to_go": (
        lambda c: c.grpo.advantage == "token_return" or not c.grpo.return_to_go,
        "grpo.advantage=token_return",
    ),
    "grpo.false_scale": (lambda c: c.grpo.advantage == "itemwise", "grpo.advantage=itemwise"),
    "grpo.mix": (lambda c: c.grpo.advantage != "sequence" or c.grpo.mix == 0, "a grpo.advantage other than sequence"),
    "grpo.mix_anneal": (lambda c: c.grpo.mix > 0 or c.grpo.mix_anneal == 0, "grpo.mix more than 0"),
    "grpo.weight_clip": (lambda c: c.grpo.credits_tokens, DENSE),
    "grpo.top_items": (lambda c: c.grpo.credits_tokens, DENSE),
    **{
        f"judge.{name}": (lambda c: c.grpo.credits_tokens, DENSE)
        for name in ("shuffle", "attribution", "credit", "gate_queries", "gate_levels")
    },
    "alarms.faithless": (lambda c: c.grpo.credits_tokens, DENSE),
    "grpo.kl_estimator": (lambda c: c.grpo.kl_coef > 0, "grpo.kl_coef more than 0"),
    "optimizer.min_lr": (lambda c: c.optimizer.decay != "constant", "optimizer.decay linear or cosine"),
    "rollout.engine": (lambda c: not c.rollout.replay, "rollout.replay left out: nothing is sampled"),
    "rollout.correction": (
        lambda c: c.rollout.engine == "vllm" or bool(c.rollout.replay),
        "rollout.engine=vllm, or a replay of what it sampled",
    ),
    "rollout.correction_bounds": (lambda c: c.rollout.correction != "none", "a rollout.correction other than none"),
    "rollout.vllm.mode": (lambda c: _samples_with_vllm(c), VLLM),
    "rollout.vllm.options": (lambda c: _samples_with_vllm(c), VLLM),
    "rollout.vllm.urls": (lambda c: _on_servers(c), "rollout.engine=vllm and rollout.vllm.mode=servers"),
    "rollout.vllm.behind_proxy": (lambda c: _on_servers(c), "rollout.engine=vllm and rollout.vllm.mode=servers"),
    "eval.samples": (lambda c: bool(c.eval.data), "eval.data"),
    "eval.greedy": (lambda c: bool(c.eval.data), "eval.data"),
    "eval.judge.model": (lambda c: bool(c.eval.data), "eval.data"),
    "log.wandb_project": (lambda c: c.log.wandb, "log.wandb"),
    "log.samples_every": (lambda c: c.log.samples_per_step > 0, "log.samples_per_step more than 0"),
}


Config = TrainConfig | OfflineJudgeConfig | ServeConfig


def warn_of_unused(config: Config, defaults: Config) -> None:
    """Name every option that is set and has no effect, and what it needs. Both are resolved, with the same preset."""
    for option, (has_effect, needed) in (OF_TRAINING if isinstance(config, TrainConfig) else OF_JUDGE).items():
        read = attrgetter(option)
        value = read(config)
        if value != read(defaults) and not has_effect(config):
            warn(f"{option}: {value} has no effect; it needs {needed}")


def _samples_with_vllm(config: TrainConfig) -> bool:
    return config.rollout.engine == "vllm" and not config.rollout.replay


def _on_servers(config: TrainConfig) -> bool:
    return _samples_with_vllm(config) and config.rollout.vllm.mode == "servers"
