"""Cross-checks of a resolved config, before anything heavy is imported and before anything is written.

Here is what the options alone (and the size of the world) decide. Checked where they are opened: models
(model/hf.py), tokenizers (data/tokenizer.py), layouts against a model (config/layout.py), rows (data/readers.py).
"""

import math
import os
from dataclasses import dataclass
from importlib.util import find_spec
from ipaddress import ip_address
from pathlib import Path
from typing import Any

from g2r_megatron.config.layout import check_layout
from g2r_megatron.config.options import (
    PRESETS,
    GrpoConfig,
    JudgeConfig,
    LogConfig,
    OfflineJudgeConfig,
    ProbeConfig,
    RolloutConfig,
    TrainConfig,
    fill_from_preset,
    resolve_preset,
)
from g2r_megatron.config.serve_options import API_KEY_VARIABLE, ServeConfig, ServiceConfig
from g2r_megatron.config.trackers import check_wandb_login
from g2r_megatron.config.unused import warn_of_unused
from g2r_megatron.errors import UserError, warn

SHORTEST_KEY = 16  # characters of an API key
TEMPLATE_FIELDS = ("conversation", "response", "criterion")


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
PROBE_RANGES = {**JUDGE_RANGES, "sample": COUNT, "false_sample": COUNT_OR_OFF, "seed": SEED}
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
TRAIN_RANGES = {
    **JUDGE_RANGES,
    "steps": COUNT,
    "seed": SEED,
    "eval_every": COUNT_OR_OFF,
    "eval_responses": COUNT,
    "timeout_minutes": POSITIVE,
    "policy.micro_batch_tokens": COUNT,
    "rollout.prompts_per_step": COUNT,
    "rollout.responses_per_prompt": COUNT,
    "rollout.temperature": NOT_NEGATIVE,
    "rollout.top_p": POSITIVE_FRACTION,
    "rollout.top_k": COUNT_OR_OFF,
    "rollout.max_prompt_tokens": COUNT,
    "rollout.max_response_tokens": COUNT,
    "rollout.batch_size": COUNT,
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
    "log.samples_per_step": COUNT_OR_OFF,
    "log.samples_every": COUNT,
}


def check_train_config(config: TrainConfig, world_size: int) -> None:
    """Raise ``UserError`` for the first thing in a resolved ``config`` that cannot work on ``world_size`` ranks."""
    _require_given("policy.model", config.policy.model, "give the Hugging Face directory the policy starts from")
    _require_given("data.train", config.data.train, "give at least one file of queries (.jsonl, .parquet, ...)")
    _require_given("output_dir", config.output_dir, "give the run directory")
    _require_given("rollout.think_end", config.rollout.think_end, "give auto, none, or the text that ends a thought")
    _check_ranges(config, TRAIN_RANGES)
    _check_judge_place(config.judge, config.rollout, world_size)
    check_layout("policy", config.policy.layout, world_size, config.judge.ranks)
    _check_judge(config.judge, world_size)
    _check_grpo(config.grpo, config.rollout)
    _check_engine(config.rollout)
    _check_schedule(config)
    _check_evaluation(config)
    warn_of_unused(config, resolve_preset(TrainConfig(grpo=GrpoConfig(preset=config.grpo.preset))))
    _warn_of_small_budget(config)
    check_packages(config.log)
    _check_directory("output_dir", config.output_dir)


def check_judge_config(config: OfflineJudgeConfig, world_size: int) -> None:
    """Raise ``UserError`` for the first thing in a resolved ``config`` that cannot work on ``world_size`` ranks."""
    _require_given("judge.model", config.judge.model, "give the Hugging Face directory of the judge")
    _require_given("input", config.input, "give the file of rows to judge (.jsonl, .parquet, ...)")
    _require_given("output", config.output, "give the .jsonl file to write")
    _check_ranges(config, OFFLINE_JUDGE_RANGES)
    _check_judge_is_alone(config.judge, "g2r judge")
    _check_judge(config.judge, world_size)
    defaults = fill_from_preset(JudgeConfig(), PRESETS[config.preset]["judge"])
    warn_of_unused(config, OfflineJudgeConfig(judge=defaults))
    if config.shard >= config.shards:
        raise UserError("shard", f"{config.shard} of {config.shards} shards", "shards are counted from 0")
    if config.shards == 1 and Path(config.output).exists():
        remedy = "give a new file, or remove it: results are never overwritten"
        raise UserError("output", f"{config.output} exists", remedy)
    _check_file_can_be_made("output", config.output)


def _check_judge_is_alone(judge: JudgeConfig, command: str) -> None:
    for option, default in (("ranks", 0), ("parts", None), ("offload", False)):
        if (value := getattr(judge, option)) != default:
            raise UserError(
                f"judge.{option}",
                f"{value} in {command}",
                "leave it out: all ranks are the judge's, and no policy waits",
            )


def check_probe_config(config: ProbeConfig, world_size: int) -> None:
    """Raise ``UserError`` for the first thing in ``config``, not yet filled from a preset, that cannot work on ``world_size`` ranks."""
    _require_given("judge.model", config.judge.model, "give the Hugging Face directory of the judge")
    _require_given("input", config.input, "give the file of rows with responses (.jsonl, .parquet, ...)")
    _require_given("output", config.output, "give the directory to write to")
    _require_given("attributions", config.attributions, "give at least one attribution, or leave it out")
    _check_ranges(config, PROBE_RANGES)
    _check_judge_is_alone(config.judge, "g2r probe")
    own = {"attribution": "attributions", "gate_queries": "attributions", "target": "nothing: it is the logit margin"}
    own |= {"credit": "nothing: items are measured one by one", "shuffle": "nothing: a placebo is always measured"}
    for option, instead in own.items():
        if (value := getattr(config.judge, option)) != getattr(JudgeConfig(), option):
            raise UserError(f"judge.{option}", f"{value} in g2r probe", f"leave it out, and give {instead}")
    _check_judge(fill_from_preset(config.judge, PRESETS["robust"]["judge"]), world_size)
    _check_directory("output", config.output)


def check_serve_config(config: ServeConfig, world_size: int | None) -> None:
    """Raise ``UserError`` for the first thing in a resolved ``config`` that cannot work.

    ``world_size``: ranks of the judge; None in the HTTP front, which does not know how many its launcher starts.
    """
    _require_given("judge.model", config.judge.model, "give the Hugging Face directory of the judge")
    _check_ranges(config, SERVE_RANGES)
    _check_judge_is_alone(config.judge, "g2r serve")
    layout = config.judge.layout
    _check_judge(config.judge, layout.tp * layout.cp * layout.pp if world_size is None else world_size)
    defaults = fill_from_preset(JudgeConfig(), PRESETS[config.preset]["judge"])
    warn_of_unused(config, ServeConfig(judge=defaults))
    if "judge" in config.serve.tokenizers:
        raise UserError("serve.tokenizers", "judge", "this name is the judge's own tokenizer's: give another one")
    if config.judge.credit == "per_response" and "occlusion" in config.serve.attributions:
        raise UserError(
            "serve.attributions", "occlusion with judge.credit per_response", "use per_item, or leave it out"
        )
    key = api_key(config.serve)
    if not key and not is_loopback(config.serve.host):
        raise UserError(
            "serve.host",
            f"{config.serve.host} without an API key",
            f"give serve.api_key_file or set {API_KEY_VARIABLE}: only a loopback address needs none",
        )
    if config.serve.url_file:
        _check_file_can_be_made("serve.url_file", config.serve.url_file)


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches ``host``."""
    try:
        return host == "localhost" or ip_address(host).is_loopback
    except ValueError:  # another name
        return False


def api_key(serve: ServiceConfig) -> str:
    """The key that clients must send, "" for none. Raises ``UserError`` for a file or a key that cannot be one."""
    where, key = API_KEY_VARIABLE, os.environ.get(API_KEY_VARIABLE, "")
    if serve.api_key_file:
        where = "serve.api_key_file"
        try:
            key = Path(serve.api_key_file).read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(
                where, f"{serve.api_key_file} cannot be read ({error})", "give a file of one line"
            ) from error
    if (key or serve.api_key_file) and not (len(key) >= SHORTEST_KEY and key.isascii() and key.isprintable()):
        remedy = f"give {SHORTEST_KEY} or more printable ASCII characters, e.g. of: openssl rand -hex 32"
        raise UserError(where, f"a key of {len(key)} characters", remedy)
    return key


def _require_given(option: str, value: object, remedy: str) -> None:
    if not value:
        raise UserError(option, "missing", remedy)


def _check_ranges(
    config: TrainConfig | OfflineJudgeConfig | ProbeConfig | ServeConfig, ranges: dict[str, Range]
) -> None:
    for option, allowed in ranges.items():
        value: Any = config
        for name in option.split("."):
            value = getattr(value, name)
        if value is not None and not allowed.holds(value):
            raise UserError(option, str(value), f"must be {allowed}")


def _check_judge_place(judge: JudgeConfig, rollout: RolloutConfig, world_size: int) -> None:
    if judge.ranks >= world_size:
        fits = f"at most {world_size - 1}, or start more processes" if world_size > 1 else "0 in a job of one process"
        raise UserError(
            "judge.ranks", f"{judge.ranks} of {world_size} ranks leave none to the policy", f"must be {fits}"
        )
    if judge.ranks and judge.offload:
        raise UserError(
            "judge.offload",
            f"true with judge.ranks {judge.ranks}",
            "the judge's own ranks hold nothing else to make room for: set one of them",
        )
    if judge.parts is not None and judge.parts > rollout.prompts_per_step:
        raise UserError(
            "judge.parts",
            f"{judge.parts} with rollout.prompts_per_step {rollout.prompts_per_step}",
            "a part has at least one prompt: lower it",
        )


def _check_judge(judge: JudgeConfig, world_size: int) -> None:
    check_layout("judge", judge.layout, world_size, judge.ranks)
    check_template(judge.template)
    _require_given("judge.true_words", judge.true_words, "give at least one spelling of a positive verdict")
    _require_given("judge.false_words", judge.false_words, "give at least one spelling of a negative verdict")
    shared = sorted(set(judge.true_words) & set(judge.false_words))
    if shared:
        raise UserError("judge.true_words", f"{shared} also in judge.false_words", "give spellings that differ")
    if judge.credit == "per_response" and judge.template.index("{criterion}") < judge.template.index("{response}"):
        raise UserError(
            "judge.credit",
            "per_response with {criterion} before {response} in judge.template",
            "put the criterion after the response, so that its items share it, or use per_item",
        )
    if judge.credit == "per_response" and judge.attribution == "occlusion":
        raise UserError(
            "judge.credit",
            "per_response with judge.attribution occlusion",
            "use per_item: every item needs runs of its own",
        )
    _check_gates(judge)
    if judge.attribution == "uniform" and judge.shuffle:
        raise UserError(
            "judge.shuffle", "true with judge.attribution uniform", "leave it out: all tokens weigh the same"
        )


def _check_gates(judge: JudgeConfig) -> None:
    levels = judge.gate_levels
    if not levels or not all(POSITIVE_FRACTION.holds(level) for level in levels) or len(set(levels)) < len(levels):
        raise UserError(
            "judge.gate_levels", str(levels), f"give at least one number, each {POSITIVE_FRACTION} and there once"
        )
    for option, default in (("gate_queries", None), ("gate_levels", [1.0])):
        if judge.attribution != "gate" and (value := getattr(judge, option)) != default:
            raise UserError(
                f"judge.{option}",
                f"{value} with judge.attribution {judge.attribution}",
                "it is an option of judge.attribution=gate: set that, or leave it out",
            )


def _check_grpo(grpo: GrpoConfig, rollout: RolloutConfig) -> None:
    group = rollout.responses_per_prompt
    if group < 2:
        raise UserError(
            "rollout.responses_per_prompt",
            f"{group} with grpo.baseline={grpo.baseline}",
            "responses are compared within their group: give at least 2",
        )
    if rollout.temperature == 0 or rollout.top_k == 1:
        option = "rollout.top_k" if rollout.top_k == 1 else "rollout.temperature"
        raise UserError(
            option,
            f"{rollout.top_k if rollout.top_k == 1 else 0} makes the responses of a prompt all the same",
            "training learns from their differences: sample (eval_greedy evaluates greedily)",
        )
    responses = rollout.prompts_per_step * group
    if responses % grpo.mini_batches:
        raise UserError(
            "grpo.mini_batches", str(grpo.mini_batches), f"must divide the {responses} responses of a step evenly"
        )
    clip = grpo.weight_clip
    if clip is not None and not (len(clip) == 2 and 0 <= clip[0] <= 1 <= clip[1] < math.inf):
        raise UserError("grpo.weight_clip", str(clip), "must be [low, high] with 0 <= low <= 1 <= high")


def _check_engine(rollout: RolloutConfig) -> None:
    bounds, filtered = rollout.correction_bounds, rollout.top_p < 1 or rollout.top_k > 0
    if bounds is not None and not (len(bounds) == 2 and 0 <= bounds[0] < 1 < bounds[1] < math.inf):
        raise UserError("rollout.correction_bounds", str(bounds), "must be [low, high] with 0 <= low < 1 < high")
    if rollout.correction == "tis" and bounds is not None and bounds[0] > 0:
        raise UserError("rollout.correction_bounds", f"{bounds} with tis", "tis has no lower bound: give [0, high]")
    if rollout.engine == "megatron":
        return
    if filtered and rollout.correction != "none":
        raise UserError(
            "rollout.correction",
            f"{rollout.correction} with rollout.top_p {rollout.top_p:g} and top_k {rollout.top_k}",
            "the sampler's log-probs are of all tokens: set top_p 1 and top_k 0, or correction none",
        )
    if filtered and rollout.temperature != 1:
        raise UserError(
            "rollout.temperature",
            f"{rollout.temperature:g} with rollout.engine vllm, top_p {rollout.top_p:g} and top_k {rollout.top_k}",
            "vLLM has no log-probs at this temperature without the filters: set temperature 1, or top_p 1 and top_k 0",
        )
    if find_spec("vllm") is None:
        raise UserError(
            "rollout.engine",
            "vllm, but the package vllm is not installed",
            "pip install 'g2r-megatron[vllm]' on a machine with a GPU, make vllm without one, or set it megatron",
        )


def _check_schedule(config: TrainConfig) -> None:
    optimizer = config.optimizer
    if optimizer.warmup_steps >= config.steps:
        raise UserError(
            "optimizer.warmup_steps", str(optimizer.warmup_steps), f"must be less than steps {config.steps}"
        )
    if optimizer.min_lr > optimizer.lr:
        raise UserError("optimizer.min_lr", str(optimizer.min_lr), f"must be at most optimizer.lr {optimizer.lr}")


def _check_evaluation(config: TrainConfig) -> None:
    if config.eval_every and not config.data.eval:
        raise UserError("eval_every", f"{config.eval_every} without data.eval", "give data.eval files or set it to 0")
    if config.eval_greedy and config.eval_responses > 1:
        found = f"{config.eval_responses} with eval_greedy"
        raise UserError(
            "eval_responses", found, "greedy responses of a prompt are all the same: set it to 1, or sample"
        )


def _warn_of_small_budget(config: TrainConfig) -> None:
    budget, longest = (
        config.policy.micro_batch_tokens,
        config.rollout.max_prompt_tokens + config.rollout.max_response_tokens,
    )
    if longest > budget:
        warn(
            f"policy.micro_batch_tokens {budget}: a sequence can have {longest} tokens, and is then a micro-batch of its own"
        )


def check_packages(log: LogConfig) -> None:
    """Raise ``UserError`` unless the packages that the logging asks for are installed, and W&B has a login or needs none."""
    for option, wanted, package in (
        ("log.tensorboard", log.tensorboard, "tensorboard"),
        ("log.wandb", log.wandb, "wandb"),
    ):
        if wanted and find_spec(package) is None:
            raise UserError(option, f"package {package} is not installed", f"pip install {package} or set it false")
    if log.wandb:
        check_wandb_login()


def check_template(template: str) -> None:
    """Raise ``UserError`` unless each field of the judge's template is there exactly once."""
    counts = {name: template.count("{" + name + "}") for name in TEMPLATE_FIELDS}
    wrong = [f"{{{name}}} {count} times" for name, count in counts.items() if count != 1]
    if wrong:
        raise UserError(
            "judge.template",
            f"has {', '.join(wrong)}",
            "each of {conversation}, {response}, {criterion} must be there once",
        )


def _check_directory(option: str, path: str) -> None:
    """``path`` is a writable directory or can be made: its nearest existing parent is a writable directory."""
    nearest = Path(path).absolute()
    while not nearest.exists():
        nearest = nearest.parent
    if not nearest.is_dir():
        raise UserError(option, f"{path}: {nearest} is a file", "give a directory")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise UserError(option, f"{path}: no permission to write in {nearest}", "give a directory you may write in")


def _check_file_can_be_made(option: str, path: str) -> None:
    """``path`` can be made in an existing directory."""
    file = Path(path)
    if not file.parent.is_dir():
        raise UserError(option, f"{path}: no directory {file.parent}", "create the directory, or give another file")
    if not os.access(file.parent, os.W_OK | os.X_OK):
        raise UserError(option, f"{path}: no permission to write in {file.parent}", "give a directory you may write in")
