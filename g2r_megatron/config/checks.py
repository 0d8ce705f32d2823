"""Cross-checks of a resolved config, before anything heavy is imported and before anything is written.

Here is what the options alone (and the size of the world) decide. Checked where they are opened: models
(model/hf.py), tokenizers (data/tokenizer.py), layouts against a model (config/layout.py), rows (data/readers.py).
"""

import math
import os
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from g2r_megatron.config.alarm_options import ALARMS
from g2r_megatron.config.layout import check_layout
from g2r_megatron.config.options import (
    PRESETS,
    EvalConfig,
    GrpoConfig,
    JudgeConfig,
    LogConfig,
    OfflineJudgeConfig,
    ProbeConfig,
    RolloutConfig,
    TrainConfig,
    VerdictJudgeConfig,
    VerifierConfig,
    fill_from_preset,
    resolve_preset,
)
from g2r_megatron.config.server_urls import check_urls
from g2r_megatron.config.trackers import check_wandb_login
from g2r_megatron.config.unused import warn_of_unused
from g2r_megatron.errors import UserError, warn

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
VERIFIER_RANGES = {"verifier.timeout_seconds": POSITIVE, "verifier.memory_mib": Range(64)}
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
    _check_evaluation(config, world_size)
    _check_verifier(config.verifier)
    _check_alarms(config)
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
    _check_sampling(config, world_size, "g2r probe")
    _check_directory("output", config.output)


def check_eval_config(config: EvalConfig, world_size: int) -> None:
    """Raise ``UserError`` for the first thing in ``config`` that cannot work on ``world_size`` ranks."""
    _require_given("output", config.output, "give the directory to write to")
    if bool(config.policy.model) == bool(config.responses):
        found = "given, and responses too" if config.responses else "missing"
        raise UserError("policy.model", found, "give either a model to sample from, or responses in files")
    if config.policy.model:
        _require_given("data", config.data, "give at least one file of rows (.jsonl, .parquet, ...)")
    _check_ranges(config, EVAL_RANGES)
    _check_samples(config.samples, config.greedy, "")
    _check_sampling(config, world_size, "g2r eval")
    _check_verdicts("judge", config.judge, world_size)
    _check_verifier(config.verifier)
    _check_directory("output", config.output)


def _check_sampling(config: ProbeConfig | EvalConfig, world_size: int, command: str) -> None:
    if config.policy.model:
        check_layout("policy", config.policy.layout, world_size)
        _require_given(
            "rollout.think_end", config.rollout.think_end, "give auto, none, or the text that ends a thought"
        )
    for option in ("prompts_per_step", "responses_per_prompt", "correction", "correction_bounds"):
        if (value := getattr(config.rollout, option)) != getattr(RolloutConfig(), option):
            raise UserError(f"rollout.{option}", f"{value} in {command}", "leave it out: it is of training")
    _check_engine(config.rollout)


def _check_samples(samples: int, greedy: bool, section: str) -> None:
    if greedy and samples > 1:
        found = f"{samples} with {section}greedy"
        raise UserError(
            f"{section}samples", found, "greedy responses of a prompt are all the same: set it to 1, or sample"
        )


def _require_given(option: str, value: object, remedy: str) -> None:
    if not value:
        raise UserError(option, "missing", remedy)


def _check_ranges(
    config: TrainConfig | OfflineJudgeConfig | ProbeConfig | EvalConfig, ranges: dict[str, Range]
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


def _check_verdicts(
    section: str, judge: JudgeConfig | VerdictJudgeConfig, world_size: int, judge_ranks: int = 0
) -> None:
    check_layout(section, judge.layout, world_size, judge_ranks)
    check_template(judge.template, section)
    _require_given(f"{section}.true_words", judge.true_words, "give at least one spelling of a positive verdict")
    _require_given(f"{section}.false_words", judge.false_words, "give at least one spelling of a negative verdict")
    shared = sorted(set(judge.true_words) & set(judge.false_words))
    if shared:
        raise UserError(
            f"{section}.true_words", f"{shared} also in {section}.false_words", "give spellings that differ"
        )


def _check_judge(judge: JudgeConfig, world_size: int) -> None:
    _check_verdicts("judge", judge, world_size, judge.ranks)
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
            "training learns from their differences: sample (eval.greedy evaluates greedily)",
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
    if rollout.vllm.mode == "servers":
        check_urls(rollout.vllm)
    elif find_spec("vllm") is None:
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


def _check_evaluation(config: TrainConfig, world_size: int) -> None:
    held_out = config.eval
    if held_out.every and not held_out.data:
        raise UserError("eval.every", f"{held_out.every} without eval.data", "give eval.data files or set it to 0")
    _check_samples(held_out.samples, held_out.greedy, "eval.")
    gold = held_out.judge
    if gold.model is None:
        if gold != VerdictJudgeConfig():
            raise UserError("eval.judge", "options without eval.judge.model", "give it a model, or leave them out")
        return
    _check_verdicts("eval.judge", gold, world_size, config.judge.ranks)
    own = config.judge.model or config.policy.model
    if own and os.path.realpath(gold.model) == os.path.realpath(own):
        warn(
            f"eval.judge.model {gold.model} is the judge that training learns from: what exploits it scores well there too"
        )


def _check_alarms(config: TrainConfig) -> None:
    for name in config.alarms.stop_on:
        if name not in ("all", *ALARMS):
            raise UserError("alarms.stop_on", f"{name!r} is no alarm", f"give all, or some of {', '.join(ALARMS)}")
        if name != "all" and getattr(config.alarms, name) is None:
            raise UserError(
                "alarms.stop_on", f"{name}, but alarms.{name} is null", "give it a threshold, or leave it out"
            )
    if config.checkpoint.keep_best and not config.eval.data:
        found = f"{config.checkpoint.keep_best} without eval.data"
        raise UserError("checkpoint.keep_best", found, "it is a metric of evaluations: give eval.data files")


def _check_verifier(verifier: VerifierConfig) -> None:
    if verifier.kind == "command" and not verifier.command:
        raise UserError("verifier.command", "missing with verifier.kind command", "give the program that decides")
    if verifier.kind != "command" and verifier.command:
        raise UserError("verifier.command", f"given with verifier.kind {verifier.kind}", "set the kind to command")
    _require_given("verifier.criterion", verifier.criterion, "give what the judge is asked")


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


def check_template(template: str, section: str = "judge") -> None:
    """Raise ``UserError`` unless each field of the judge's template is there exactly once."""
    counts = {name: template.count("{" + name + "}") for name in TEMPLATE_FIELDS}
    wrong = [f"{{{name}}} {count} times" for name, count in counts.items() if count != 1]
    if wrong:
        raise UserError(
            f"{section}.template",
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
