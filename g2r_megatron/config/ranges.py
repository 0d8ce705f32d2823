"""Which numbers each option may have, and the checks of one option by itself that several commands share."""

import math
import os
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path

from g2r_megatron.errors import UserError


@dataclass(frozen=True)
class Range:
    """An interval of finite numbers; ``open_low``/``open_high`` leave its ends out."""

    low: float
    high: float = math.inf
    open_low: bool = False
    open_high: bool = False

    def holds(self, value: float) -> bool:
        """False for NaN and the infinities too."""
        above = value > self.low if self.open_low else value >= self.low
        below = value < self.high if self.open_high else value <= self.high
        return above and below and math.isfinite(value)

    def __str__(self) -> str:
        low = f"{'more than' if self.open_low else 'at least'} {self.low:g}"
        if self.high == math.inf:
            return low
        return f"{low} and {'less than' if self.open_high else 'at most'} {self.high:g}"


COUNT = Range(1)
COUNT_OR_OFF = Range(0)
NOT_NEGATIVE = Range(0)
POSITIVE = Range(0, open_low=True)
FRACTION = Range(0, 1)
POSITIVE_FRACTION = Range(0, 1, open_low=True)
BELOW_ONE = Range(0, 1, open_high=True)
SEED = Range(0, 2**32 - 1)

JUDGE_RANGES = {
    "judge.ranks": COUNT_OR_OFF,
    "judge.parts": COUNT,
    "judge.micro_batch_tokens": COUNT,
    "judge.max_length": COUNT,
    "judge.contraction": POSITIVE_FRACTION,
    "judge.tau": POSITIVE,
    "judge.smear_gamma": BELOW_ONE,
    "judge.flat_threshold": POSITIVE_FRACTION,
}
OFFLINE_JUDGE_RANGES = {
    **JUDGE_RANGES,
    "batch_rows": COUNT,
    "seed": SEED,
    "shards": Range(1, 99999),  # as many digits as the parts' names have
    "shard": NOT_NEGATIVE,
}
VERIFIER_RANGES = {"verifier.timeout_seconds": POSITIVE, "verifier.memory_mib": Range(64)}
SERVE_RANGES = {
    **JUDGE_RANGES,
    "seed": SEED,
    "serve.port": Range(0, 65535),
    "serve.batch_rows": COUNT,
    "serve.batch_wait_ms": COUNT_OR_OFF,
    "serve.queue_requests": COUNT,
    "serve.queue_bytes": COUNT,
    "serve.max_body_bytes": COUNT,
    "serve.max_responses": COUNT,
    "serve.max_items": COUNT,
    "serve.deadline_seconds": POSITIVE,
    "serve.receive_seconds": POSITIVE,
    "serve.max_connections": COUNT,
    "serve.cache_bytes": COUNT_OR_OFF,
    "serve.drain_seconds": NOT_NEGATIVE,
    "serve.max_restarts": COUNT_OR_OFF,
}
SAMPLING_RANGES = {
    "rollout.temperature": NOT_NEGATIVE,
    "rollout.top_p": POSITIVE_FRACTION,
    "rollout.top_k": COUNT_OR_OFF,
    "rollout.max_prompt_tokens": COUNT,
    "rollout.max_response_tokens": COUNT,
    "rollout.batch_size": COUNT,
}
PROBE_RANGES = {**JUDGE_RANGES, **SAMPLING_RANGES, "sample": COUNT, "false_sample": COUNT_OR_OFF, "seed": SEED}
EVAL_RANGES = {
    **SAMPLING_RANGES,
    **VERIFIER_RANGES,
    "samples": COUNT,
    "batch_rows": COUNT,
    "seed": SEED,
    "judge.micro_batch_tokens": COUNT,
    "judge.max_length": COUNT,
}
TRAIN_RANGES = {
    **JUDGE_RANGES,
    **SAMPLING_RANGES,
    **VERIFIER_RANGES,
    "steps": COUNT,
    "seed": SEED,
    "eval.every": COUNT_OR_OFF,
    "eval.patience": COUNT_OR_OFF,
    "eval.samples": COUNT,
    "eval.judge.micro_batch_tokens": COUNT,
    "eval.judge.max_length": COUNT,
    "timeout_minutes": POSITIVE,
    "policy.micro_batch_tokens": COUNT,
    "rollout.prompts_per_step": COUNT,
    "rollout.responses_per_prompt": COUNT,
    "grpo.mix": FRACTION,
    "grpo.mix_anneal": FRACTION,
    "grpo.top_items": POSITIVE_FRACTION,
    "grpo.false_scale": NOT_NEGATIVE,
    "grpo.clip_low": Range(0, 1, open_low=True, open_high=True),
    "grpo.clip_high": POSITIVE,
    "grpo.kl_coef": NOT_NEGATIVE,
    "grpo.mini_batches": COUNT,
    "optimizer.lr": POSITIVE,
    "optimizer.min_lr": NOT_NEGATIVE,
    "optimizer.warmup_steps": COUNT_OR_OFF,
    "optimizer.weight_decay": NOT_NEGATIVE,
    "optimizer.beta1": BELOW_ONE,
    "optimizer.beta2": BELOW_ONE,
    "optimizer.eps": POSITIVE,
    "optimizer.clip_grad": NOT_NEGATIVE,
    "optimizer.max_bad_steps": COUNT,
    "checkpoint.save_every": COUNT_OR_OFF,
    "checkpoint.keep_last": COUNT,
    "alarms.window": COUNT,
    "alarms.every": COUNT_OR_OFF,
    "alarms.queries": COUNT,
    "alarms.answer_mass": FRACTION,
    "alarms.one_sided": FRACTION,
    "alarms.flat": FRACTION,
    "alarms.one_token": FRACTION,
    "alarms.faithless": Range(-2, 2),
    "alarms.master_keys": FRACTION,
    "alarms.gold_agreement": FRACTION,
    "alarms.exploitation": FRACTION,
    "alarms.gold_down": NOT_NEGATIVE,
    "alarms.length": Range(1),
    "alarms.internalization": NOT_NEGATIVE,
    "log.samples_per_step": COUNT_OR_OFF,
    "log.samples_every": COUNT,
}


def require_given(option: str, value: object, remedy: str) -> None:
    if not value:
        raise UserError(option, "missing", remedy)


def check_ranges(config: object, ranges: dict[str, Range]) -> None:
    for option, allowed in ranges.items():
        value = attrgetter(option)(config)
        if value is not None and not allowed.holds(value):
            raise UserError(option, str(value), f"must be {allowed}")


def check_directory(option: str, path: str) -> None:
    """``path`` is a writable directory or can be made: its nearest existing parent is a writable directory."""
    nearest = Path(path).absolute()
    while not nearest.exists():
        nearest = nearest.parent
    if not nearest.is_dir():
        raise UserError(option, f"{path}: {nearest} is a file", "give a directory")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise UserError(option, f"{path}: no permission to write in {nearest}", "give a directory you may write in")


def check_file_can_be_made(option: str, path: str) -> None:
    """``path`` can be made in an existing directory."""
    file = Path(path)
    if not file.parent.is_dir():
        raise UserError(option, f"{path}: no directory {file.parent}", "create the directory, or give another file")
    if not os.access(file.parent, os.W_OK | os.X_OK):
        raise UserError(option, f"{path}: no permission to write in {file.parent}", "give a directory you may write in")
