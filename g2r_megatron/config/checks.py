"""Cross-checks of a resolved config, before anything heavy is imported and before anything is written.

Here is what the options alone (and the size of the world) decide. Checked where they are opened: models
(model/hf.py), tokenizers (data/tokenizer.py), layouts against a model (config/layout.py), rows (data/readers.py).
"""

import math
import os
from importlib.util import find_spec
from pathlib import Path

from g2r_megatron.config.alarm_checks import check_alarms
from g2r_megatron.config.command_options import EvalConfig, OfflineJudgeConfig, ProbeConfig
from g2r_megatron.config.layout import check_layout
from g2r_megatron.config.options import (
    GrpoConfig,
    JudgeConfig,
    LogConfig,
    RolloutConfig,
    TrainConfig,
    VerdictJudgeConfig,
    VerifierConfig,
)
from g2r_megatron.config.presets import PRESETS, fill_from_preset, resolve_preset
from g2r_megatron.config.ranges import (
    EVAL_RANGES,
    OFFLINE_JUDGE_RANGES,
    POSITIVE_FRACTION,
    PROBE_RANGES,
    TRAIN_RANGES,
    check_directory,
    check_file_can_be_made,
    check_ranges,
    require_given,
)
from g2r_megatron.config.server_urls import check_urls
from g2r_megatron.config.trackers import check_wandb_login
from g2r_megatron.config.unused import warn_of_unused
from g2r_megatron.errors import UserError, warn

TEMPLATE_FIELDS = ("conversation", "response", "criterion")


def check_train_config(config: TrainConfig, world_size: int) -> None:
    """Raise ``UserError`` for the first thing in a resolved ``config`` that cannot work on ``world_size`` ranks."""
    require_given("policy.model", config.policy.model, "give the Hugging Face directory the policy starts from")
    require_given("data.train", config.data.train, "give at least one file of queries (.jsonl, .parquet, ...)")
    require_given("output_dir", config.output_dir, "give the run directory")
    require_given("rollout.think_end", config.rollout.think_end, "give auto, none, or the text that ends a thought")
    check_ranges(config, TRAIN_RANGES)
    _check_judge_place(config.judge, config.rollout, world_size)
    check_layout("policy", config.policy.layout, world_size, config.judge.ranks)
    check_judge(config.judge, world_size)
    _check_grpo(config.grpo, config.rollout)
    _check_engine(config.rollout)
    _check_recordings(config.rollout)
    _check_schedule(config)
    _check_evaluation(config, world_size)
    _check_verifier(config.verifier)
    check_alarms(config)
    warn_of_unused(config, resolve_preset(TrainConfig(grpo=GrpoConfig(preset=config.grpo.preset))))
    _warn_of_small_budget(config)
    check_packages(config.log)
    check_directory("output_dir", config.output_dir)


def check_judge_config(config: OfflineJudgeConfig, world_size: int) -> None:
    """Raise ``UserError`` for the first thing in a resolved ``config`` that cannot work on ``world_size`` ranks."""
    require_given("judge.model", config.judge.model, "give the Hugging Face directory of the judge")
    require_given("input", config.input, "give the file of rows to judge (.jsonl, .parquet, ...)")
    require_given("output", config.output, "give the file to write")
    check_ranges(config, OFFLINE_JUDGE_RANGES)
    check_judge_is_alone(config.judge, "g2r judge")
    check_judge(config.judge, world_size)
    defaults = fill_from_preset(JudgeConfig(), PRESETS[config.preset]["judge"])
    warn_of_unused(config, OfflineJudgeConfig(judge=defaults))
    if config.dump_inputs and config.format_out != "jsonl":
        raise UserError("dump_inputs", f"with format_out {config.format_out}", "leave it out, or use format_out jsonl")
    if config.shard >= config.shards:
        raise UserError("shard", f"{config.shard} of {config.shards} shards", "shards are counted from 0")
    if config.shards == 1 and Path(config.output).exists():
        remedy = "give a new file, or remove it: results are never overwritten"
        raise UserError("output", f"{config.output} exists", remedy)
    check_file_can_be_made("output", config.output)


def check_judge_is_alone(judge: JudgeConfig, command: str) -> None:
    for option, default in (("ranks", 0), ("parts", None), ("offload", False)):
        if (value := getattr(judge, option)) != default:
            raise UserError(
                f"judge.{option}",
                f"{value} in {command}",
                "leave it out: all ranks are the judge's, and no policy waits",
            )


def check_probe_config(config: ProbeConfig, world_size: int) -> None:
    """Raise ``UserError`` for the first thing in ``config``, not yet filled from a preset, that cannot work on ``world_size`` ranks."""
    require_given("judge.model", config.judge.model, "give the Hugging Face directory of the judge")
    require_given("input", config.input, "give the file of rows with responses (.jsonl, .parquet, ...)")
    require_given("output", config.output, "give the directory to write to")
    require_given("attributions", config.attributions, "give at least one attribution, or leave it out")
    check_ranges(config, PROBE_RANGES)
    check_judge_is_alone(config.judge, "g2r probe")
    own = {"attribution": "attributions", "gate_queries": "attributions", "target": "nothing: it is the logit margin"}
    own |= {"credit": "nothing: items are measured one by one", "shuffle": "nothing: a placebo is always measured"}
    for option, instead in own.items():
        if (value := getattr(config.judge, option)) != getattr(JudgeConfig(), option):
            raise UserError(f"judge.{option}", f"{value} in g2r probe", f"leave it out, and give {instead}")
    check_judge(fill_from_preset(config.judge, PRESETS["robust"]["judge"]), world_size)
    _check_sampling(config, world_size, "g2r probe")
    check_directory("output", config.output)


def check_eval_config(config: EvalConfig, world_size: int) -> None:
    """Raise ``UserError`` for the first thing in ``config`` that cannot work on ``world_size`` ranks."""
    require_given("output", config.output, "give the directory to write to")
    if bool(config.policy.model) == bool(config.responses):
        found = "given, and responses too" if config.responses else "missing"
        raise UserError("policy.model", found, "give either a model to sample from, or responses in files")
    if config.policy.model:
        require_given("data", config.data, "give at least one file of rows (.jsonl, .parquet, ...)")
    check_ranges(config, EVAL_RANGES)
    _check_samples(config.samples, config.greedy, "")
    _check_sampling(config, world_size, "g2r eval")
    _check_verdicts("judge", config.judge, world_size)
    _check_verifier(config.verifier)
    check_directory("output", config.output)


def _check_sampling(config: ProbeConfig | EvalConfig, world_size: int, command: str) -> None:
    if config.policy.model:
        check_layout("policy", config.policy.layout, world_size)
        require_given("rollout.think_end", config.rollout.think_end, "give auto, none, or the text that ends a thought")
    for option in ("prompts_per_step", "responses_per_prompt", "correction", "correction_bounds", "dump", "replay"):
        if (value := getattr(config.rollout, option)) != getattr(RolloutConfig(), option):
            raise UserError(f"rollout.{option}", f"{value} in {command}", "leave it out: it is of training")
    _check_engine(config.rollout)


def _check_samples(samples: int, greedy: bool, section: str) -> None:
    if greedy and samples > 1:
        found = f"{samples} with {section}greedy"
        raise UserError(
            f"{section}samples", found, "greedy responses of a prompt are all the same: set it to 1, or sample"
        )


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
    require_given(f"{section}.true_words", judge.true_words, "give at least one spelling of a positive verdict")
    require_given(f"{section}.false_words", judge.false_words, "give at least one spelling of a negative verdict")
    for option, words in (("true_words", judge.true_words), ("false_words", judge.false_words)):
        if not all(word.strip() for word in words):
            raise UserError(f"{section}.{option}", f"{words} has a blank word", "give what the judge is to say")
    shared = sorted(set(judge.true_words) & set(judge.false_words))
    if shared:
        raise UserError(
            f"{section}.true_words", f"{shared} also in {section}.false_words", "give spellings that differ"
        )


def check_judge(judge: JudgeConfig, world_size: int) -> None:
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
    if rollout.engine == "megatron" and not rollout.replay:
        return
    if filtered and rollout.correction != "none":
        raise UserError(
            "rollout.correction",
            f"{rollout.correction} with rollout.top_p {rollout.top_p:g} and top_k {rollout.top_k}",
            "the sampler's log-probs are of all tokens: set top_p 1 and top_k 0, or correction none",
        )
    if rollout.replay:  # nothing is sampled: where the responses come from does not matter
        return
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


def _check_recordings(rollout: RolloutConfig) -> None:
    if rollout.dump:
        check_directory("rollout.dump", rollout.dump)
    if rollout.replay and not Path(rollout.replay).is_dir():
        raise UserError("rollout.replay", f"no directory {rollout.replay}", "give what rollout.dump has written")
    if rollout.dump and os.path.realpath(rollout.dump) == os.path.realpath(rollout.replay):
        raise UserError(
            "rollout.dump", f"{rollout.dump} is rollout.replay too", "give another directory, or leave it out"
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
    if held_out.patience:
        found = f"{held_out.patience} without "
        if not held_out.every:
            raise UserError(
                "eval.patience", f"{found}eval.every", "it counts evaluations: give their distance in steps"
            )
        if not config.checkpoint.keep_best:
            remedy = "name the metric that is to improve, e.g. eval/judge_score"
            raise UserError("eval.patience", f"{found}checkpoint.keep_best", remedy)
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


def _check_verifier(verifier: VerifierConfig) -> None:
    if verifier.kind == "command" and not verifier.command:
        raise UserError("verifier.command", "missing with verifier.kind command", "give the program that decides")
    if verifier.kind != "command" and verifier.command:
        raise UserError("verifier.command", f"given with verifier.kind {verifier.kind}", "set the kind to command")
    require_given("verifier.criterion", verifier.criterion, "give what the judge is asked")


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
