"""What training would refuse, found before the job is queued. All problems are found; training stops at the first."""

import dataclasses
from collections.abc import Callable, Iterable
from dataclasses import replace

from g2r_megatron.config.checks import check_train_config
from g2r_megatron.config.options import Precision
from g2r_megatron.data.files import find_files
from g2r_megatron.data.tokenizer_files import has_tokenizer
from g2r_megatron.errors import UserError
from g2r_megatron.model.hf import CHECKPOINT_FACTS, HFModel, open_hf_model
from g2r_megatron.model.hub_cache import find_directory
from g2r_megatron.plan.config import PlanConfig


class Problems(list[UserError]):
    """Errors are collected instead of raised. The same error is kept once."""

    def catch(self, check: Callable, *args):
        """``check(*args)``, or None when it raises a ``UserError``."""
        try:
            return check(*args)
        except UserError as error:
            if str(error) not in map(str, self):
                self.append(error)
            return None


def check_config(config: PlanConfig, problems: Problems) -> tuple[HFModel | None, HFModel | None]:
    """Everything but memory: options, world, models' configs, layouts, precisions. Returns (policy, judge) if readable."""
    world = config.nodes * config.gpus_per_node
    problems.catch(_check_place, config)
    if problems:
        return None, None
    # a file that is missing so far is no mistake in a plan (``missing_files``)
    data = replace(config.data, train=config.data.train or ["-"])
    held_out = replace(config.eval, data=config.eval.data or ["-"])
    checked = replace(config, data=data, eval=held_out, output_dir=config.output_dir or ".")
    problems.catch(check_train_config, checked, world)
    if not config.policy.model:
        return None, None
    policy = problems.catch(open_hf_model, config.policy.model, "policy.model")
    judge = policy
    if config.judge.model is not None:
        judge = problems.catch(open_hf_model, config.judge.model, "judge.model")
    gold = None
    if config.eval.judge.model is not None:
        gold = problems.catch(open_hf_model, config.eval.judge.model, "eval.judge.model")
    sections = (
        ("policy", policy, config.policy),
        ("judge", judge, config.judge),
        ("eval.judge", gold, config.eval.judge),
    )
    for name, hf, section in sections:
        if hf is not None:
            problems.catch(_check_model, name, hf, section)
    return policy, judge


def _check_place(config: PlanConfig) -> None:
    for option in ("nodes", "gpus_per_node", "rubric_items", "criterion_tokens"):
        if getattr(config, option) < 1:
            raise UserError(option, str(getattr(config, option)), "must be at least 1")
    if not 0 <= config.attributed_share <= 1:
        raise UserError("attributed_share", str(config.attributed_share), "must be between 0 and 1")
    if not 0 <= config.prompt_spread < 1:
        raise UserError("prompt_spread", str(config.prompt_spread), "must be at least 0 and less than 1")
    for field in dataclasses.fields(config.hardware):
        value = getattr(config.hardware, field.name)
        if not 0 < value < float("inf") and field.name not in ("reserve_gib", "launch_us"):
            raise UserError(f"hardware.{field.name}", str(value), "must be more than 0")


def _check_model(name: str, hf: HFModel, section) -> None:
    from g2r_megatron.model.build import check_fp8_widths, check_model, check_precision_options

    check_model(name, hf, section.layout, Precision(dtype=section.precision.dtype), "torch")
    check_precision_options(name, section.precision, section.spec)
    check_fp8_widths(name, hf, section.layout, section.precision)


def missing_files(config: PlanConfig) -> list[str]:
    """Files that training will need and that are missing so far, one line each."""
    lines = []
    if not config.output_dir:
        lines.append("output_dir is not given")
    if not config.data.train:
        lines.append("data.train is not given")
    lines += [f"data file {file} is not there" for file in (*config.data.train, *config.eval.data) if not _there(file)]
    models = {"policy.model": config.policy.model, "judge.model": config.judge.model}
    models["eval.judge.model"] = config.eval.judge.model
    for option, path in models.items():
        if path is None:
            continue
        directory = find_directory(path, option)
        if (directory / CHECKPOINT_FACTS).is_file() or (directory / ".metadata").is_file():
            continue
        if not has_tokenizer(directory):
            lines.append(f"{option}: {path} has no tokenizer")
        if not any(directory.glob("*.safetensors")):
            lines.append(f"{option}: {path} has no *.safetensors")
    return lines


def _there(file: str) -> bool:
    try:
        return bool(find_files(file))
    except UserError:
        return False


def check_inputs(config: PlanConfig, models: Iterable[HFModel], problems: Problems) -> None:
    """Weight files, tokenizers, template and every data row, as training reads them. All files must be there."""
    from g2r_megatron.model.weights import check_weight_files
    from g2r_megatron.workers import read_inputs

    for hf in models:
        problems.catch(check_weight_files, hf)
    # the job may run on another machine, so what this machine can run is not checked
    plain = Precision()
    policy = replace(config.policy, precision=replace(plain, dtype=config.policy.precision.dtype), spec="torch")
    judge = replace(config.judge, precision=replace(plain, dtype=config.judge.precision.dtype), spec="torch")
    gold = config.eval.judge
    gold = replace(gold, precision=replace(plain, dtype=gold.precision.dtype), spec="torch")
    held_out = replace(config.eval, judge=gold)
    problems.catch(read_inputs, replace(config, policy=policy, judge=judge, eval=held_out))
