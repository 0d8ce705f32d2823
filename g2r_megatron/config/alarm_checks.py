"""Alarms that are to stop or change a run must be able to go on in it."""

from g2r_megatron.config.alarm_options import ALARMS
from g2r_megatron.config.options import TrainConfig
from g2r_megatron.errors import UserError


def check_alarms(config: TrainConfig) -> None:
    """Raise ``UserError`` for an alarm that is to act on the run and cannot go on in it. ``config`` is resolved."""
    never = _never(config)
    for name in config.alarms.stop_on:
        if name in never:
            raise UserError("alarms.stop_on", f"{name}, but {never[name]}", "change that, or leave the alarm out")
        if name not in ("all", *ALARMS):
            raise UserError("alarms.stop_on", f"{name!r} is no alarm", f"give all, or some of {', '.join(ALARMS)}")
        if name != "all" and getattr(config.alarms, name) is None:
            raise UserError(
                "alarms.stop_on", f"{name}, but alarms.{name} is null", "give it a threshold, or leave it out"
            )
    if config.alarms.on_faithless == "grpo":
        why = "alarms.faithless is null" if config.alarms.faithless is None else never.get("faithless")
        if why:
            raise UserError("alarms.on_faithless", f"grpo, but {why}", "leave it out")
    if config.checkpoint.keep_best and not config.eval.data:
        found = f"{config.checkpoint.keep_best} without eval.data"
        raise UserError("checkpoint.keep_best", found, "it is a metric of evaluations: give eval.data files")


def _never(config: TrainConfig) -> dict[str, str]:
    """Alarms of which nothing is ever measured in this run -> why."""
    alarms = config.alarms
    found: dict[str, str] = {}
    if not alarms.every:
        found |= dict.fromkeys(("master_keys", "internalization"), "alarms.every is 0")
    if not config.eval.data:
        found |= dict.fromkeys(("gold_agreement", "exploitation", "gold_down"), "there is no eval.data")
    if not config.grpo.credits_tokens:
        why = "no token credit is used (grpo.advantage sequence, or grpo.mix 0)"
        found |= dict.fromkeys(("flat", "one_token", "faithless"), why)
    if config.steps < 2 * alarms.window:
        found["length"] = f"steps {config.steps} are fewer than two of alarms.window {alarms.window}"
    return found
