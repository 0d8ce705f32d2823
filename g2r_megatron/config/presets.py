"""The presets, and how options that follow one, or follow others, get their values."""

from dataclasses import fields, replace
from typing import Any, TypeVar

from g2r_megatron.config.options import GrpoConfig, JudgeConfig, TrainConfig, VerdictJudgeConfig

OWN_RANKS_PARTS = 4  # default of judge.parts with judge.ranks

# Each preset is a set of ordinary options: values for the fields of options.py whose default is None.
PRESETS = {
    "grpo": {
        "judge": dict(
            target="log_prob", attribution="grad_x_embed", normalize="softmax", standardize=False, smoothing="none"
        ),
        "grpo": dict(advantage="sequence", return_to_go=False, mix=0.0, mix_anneal=0.0),
    },
    "paper": {
        "judge": dict(
            target="log_prob", attribution="grad_x_embed", normalize="softmax", standardize=False, smoothing="none"
        ),
        "grpo": dict(advantage="token_return", return_to_go=True, mix=1.0, mix_anneal=0.0),
    },
    "robust": {
        "judge": dict(
            target="logit_margin", attribution="gate", normalize="positive", standardize=False, smoothing="sentence"
        ),
        "grpo": dict(advantage="itemwise", return_to_go=False, mix=0.5, mix_anneal=0.0),
    },
}


Section = TypeVar("Section", JudgeConfig, GrpoConfig)
Config = TypeVar("Config", bound=TrainConfig)


def fill_from_preset(section: Section, values: dict[str, Any]) -> Section:
    """A copy of a config dataclass whose ``None`` options are taken from ``values``."""
    names = {f.name for f in fields(section)}
    return replace(section, **{k: v for k, v in values.items() if k in names and getattr(section, k) is None})


def without_credit(section: VerdictJudgeConfig) -> JudgeConfig:
    """A judge of verdicts alone as the judge's own code takes it, with no attribution."""
    own = {f.name: getattr(section, f.name) for f in fields(section)}
    return fill_from_preset(JudgeConfig(**own, attribution="uniform"), PRESETS["grpo"]["judge"])


def resolve_preset(config: Config) -> Config:
    """The config with every option made concrete that follows the preset or others."""
    preset = PRESETS[config.grpo.preset]
    parts = min(OWN_RANKS_PARTS, config.rollout.prompts_per_step) if config.judge.ranks else 1
    return replace(
        config,
        judge=fill_from_preset(config.judge, preset["judge"] | {"parts": parts}),
        grpo=fill_from_preset(config.grpo, preset["grpo"]),
    )
