"""What decides the responses of a run, apart from its weights after each step. A dump keeps it, and a replay compares it first."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerFast

from g2r_megatron.config.options import TrainConfig
from g2r_megatron.data.types import Query
from g2r_megatron.errors import UserError
from g2r_megatron.model.hf import CHECKPOINT_FACTS, HFModel
from g2r_megatron.model.safetensors_files import SafetensorsReader
from g2r_megatron.rollout.recording import OPTION, eval_name, read_header, recorded_files, step_name

OPTIONS = (
    *("seed", "policy.precision.dtype", "data.shuffle", "rollout.prompts_per_step", "rollout.responses_per_prompt"),
    *("rollout.temperature", "rollout.top_p", "rollout.top_k", "rollout.stop", "rollout.max_response_tokens"),
    *("rollout.chat_template", "rollout.template_options"),
)
OF_EVALUATION = ("eval.samples", "eval.greedy")
DIGESTS = {  # name of a digest -> what it is computed from
    "policy.model": "config or weights",
    "tokenizer": "tokens",
    "data.train": "prompts or their order",
    "eval.data": "prompts or their order",
}
ENGINE = "rollout.engine"  # shown to people, not compared


def facts_of(
    config: TrainConfig,
    policy: HFModel,
    tokenizer: PreTrainedTokenizerFast,
    train: Sequence[Query],
    held_out: Sequence[Query],
) -> dict[str, Any]:
    """Option -> value; of model, tokenizer and data a digest. Without held-out queries there is nothing of evaluation."""
    facts = {option: attrgetter(option)(config) for option in (*OPTIONS, ENGINE)}
    facts["policy.model"] = _model_digest(policy)
    facts["tokenizer"] = _digest(tokenizer.backend_tokenizer.to_str().encode())
    facts["data.train"] = _prompts_digest(train)
    if held_out:
        facts |= {option: attrgetter(option)(config) for option in OF_EVALUATION}
        facts["eval.data"] = _prompts_digest(held_out)
    return json.loads(json.dumps(facts))  # in the form in which a header returns them


def check_replay(config: TrainConfig, facts: Mapping[str, Any]) -> None:
    """Raise ``UserError`` unless ``rollout.replay`` has all batches of this run, sampled as ``facts`` say."""
    directory = Path(config.rollout.replay)
    recorded = [path for _, path in recorded_files(directory)]
    if not recorded:
        raise UserError(OPTION, f"no recorded steps in {directory}", "give the directory that rollout.dump wrote")
    for step in range(1, config.steps + 1):
        path = directory / f"{step_name(step)}.safetensors"
        if path not in recorded:
            steps = sum(other.name.startswith("step") for other in recorded)
            found = f"{directory} has {steps} steps, and step {step} of {config.steps} is not among them"
            raise UserError(
                OPTION, found, f"set steps to {step - 1}, or record more" if step > 1 else "record it again"
            )
        _check_facts(OPTION, path, facts, config.rollout.correction)
    for step in filter(config.evaluates_after, range(config.steps + 1)) if "eval.data" in facts else ():
        path = directory / f"{eval_name(step)}.safetensors"
        if path not in recorded:
            remedy = "set eval.every and steps as they were, or eval.data to []: nothing is sampled in a replay"
            raise UserError(OPTION, f"{directory} has no evaluation after step {step}", remedy)
        _check_facts(OPTION, path, facts, "none")


def check_dump(config: TrainConfig, facts: Mapping[str, Any], goes_on: bool) -> None:
    """Raise ``UserError`` if ``rollout.dump`` holds what this run did not write. ``goes_on``: the run has dumped there before."""
    directory = Path(config.rollout.dump)
    for _, path in recorded_files(directory):
        if not goes_on:
            raise UserError("rollout.dump", f"{directory} holds the rollouts of another run", "give a new directory")
        _check_facts("rollout.dump", path, facts, "none")


def _check_facts(option: str, path: Path, facts: Mapping[str, Any], correction: str) -> None:
    header = read_header(path)
    for name in (*OPTIONS, *DIGESTS, *OF_EVALUATION):
        before, now = header.facts.get(name), facts.get(name)
        if before == now or ((before is None or now is None) and name in ("eval.data", *OF_EVALUATION)):
            continue
        if name in DIGESTS:
            found = f"{path} was sampled with other {DIGESTS[name]} ({name})"
            raise UserError(option, found, f"give the same, or another {option}")
        found = f"{path} was sampled with {name} {before!r}, here {now!r}"
        raise UserError(option, found, f"set it so, or give another {option}")
    if correction != "none" and not header.has_log_probs:
        found = f"{correction}, but {path} has no log-probs of a sampler: the trainer itself has sampled"
        raise UserError("rollout.correction", found, "set it to none")


def _model_digest(hf: HFModel) -> str:
    """Of config.json, and of each tensor's name, type, shape and first row: two trainings of one model differ there."""
    parts = [(hf.path / "config.json").read_bytes()]
    if hf.checkpoint is not None:  # the checkpoint's facts have a check sum of every file
        return _digest(*parts, (hf.checkpoint / CHECKPOINT_FACTS).read_bytes())
    reader = SafetensorsReader(hf.path)
    for name in sorted(reader.names):
        first = reader.read(name, (0, min(1, reader.tensors[name].rows)))
        parts.append(f"{name} {reader.dtype(name)} {reader.shape(name)}".encode())
        parts.append(first.reshape(-1).view(torch.uint8).numpy().tobytes())
    return _digest(*parts)


def _prompts_digest(queries: Sequence[Query]) -> str:
    return _digest(*(json.dumps([query.id, query.messages]).encode() for query in queries))


def _digest(*parts: bytes) -> str:
    whole = hashlib.sha256()
    for part in parts:
        whole.update(len(part).to_bytes(8))
        whole.update(part)
    return whole.hexdigest()
