"""The options of every command; the dataclasses that people build in code are importable from here."""

from g2r_megatron.config.command_options import OfflineJudgeConfig
from g2r_megatron.config.options import JudgeConfig, RolloutConfig, TrainConfig

__all__ = ["JudgeConfig", "OfflineJudgeConfig", "RolloutConfig", "TrainConfig"]
