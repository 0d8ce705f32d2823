"""Sampled responses of a training as files, one file for each batch. ``rollout.dump`` writes them, ``rollout.replay`` reads them.

``step_00000003.safetensors`` has the responses of step 3, ``eval_00000002.safetensors`` those of the evaluation after step
2. Beside each is a ``.jsonl`` file for people, which no program here reads. A file gets its name only when it is complete.
"""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from g2r_megatron.errors import UserError
from g2r_megatron.records.files import make_directory, replace_bytes, replace_text
from g2r_megatron.rollout.types import Request, Sampled

NAME = re.compile(r"(step|eval)_(\d{8})\.safetensors")
HEADER = "g2r"  # of the file's metadata: a JSON object with ``keys`` and ``facts``
LOG_PROBS = "log_probs"
OPTION = "rollout.replay"
DAMAGED = "copy the file again, or record the run again with rollout.dump"


def step_name(step: int) -> str:
    """The batch that training step ``step`` learns from."""
    return f"step_{step:08d}"


def eval_name(step: int) -> str:
    """The batch of the evaluation after ``step``."""
    return f"eval_{step:08d}"


def recorded_files(directory: Path) -> list[tuple[int, Path]]:
    """(step, file) of the batches in ``directory``, in order."""
    found = directory.iterdir() if directory.is_dir() else ()
    return sorted((int(m[2]), path) for path in found if (m := NAME.fullmatch(path.name)))


class Header(NamedTuple):
    """``facts``: what decided the responses (rollout/facts.py). ``keys``: of each response. ``has_log_probs``: of a sampler
    that was not the trainer."""

    facts: dict[str, Any]
    keys: list[str]
    has_log_probs: bool


class Dump:
    """Writes the batches of one run, on one rank."""

    def __init__(self, directory: Path, facts: Mapping[str, Any], done: int):
        """``done``: the last finished step. What was recorded after it is removed: these steps come again."""
        make_directory(directory)
        self.directory, self.facts = directory, dict(facts)
        for step, path in recorded_files(directory):
            if step > done or done == 0:
                path.unlink()
                path.with_suffix(".jsonl").unlink(missing_ok=True)

    def write(self, name: str, requests: Sequence[Request], sampled: Sequence[Sampled], rows: Sequence[dict]) -> None:
        """A batch; ``rows``: what people read of each response. Raises ``UserError`` when the disk refuses."""
        version = int(name[-8:]) - name.startswith("step")  # of the weights: how many updates came before this batch
        tensors = {
            "prompt_ids": _ints([i for request in requests for i in request.prompt_ids]),
            "prompt_lengths": _ints([len(request.prompt_ids) for request in requests]),
            "response_ids": _ints([i for found in sampled for i in found.token_ids]),
            "response_lengths": _ints([len(found.token_ids) for found in sampled]),
            "finished": torch.tensor([found.finished for found in sampled], dtype=torch.bool),
            "weight_version": _ints([version] * len(sampled)),
        }
        if all(found.log_probs is not None for found in sampled):
            values = [value for found in sampled for value in found.log_probs or ()]
            tensors[LOG_PROBS] = torch.tensor(values, dtype=torch.float32)
        header = json.dumps({"facts": self.facts, "keys": [request.key for request in requests]})
        path = self.directory / f"{name}.safetensors"
        replace_text(path.with_suffix(".jsonl"), "".join(json.dumps(row) + "\n" for row in rows))
        replace_bytes(path, save(tensors, {HEADER: header}), sync=True)


def read_header(path: Path) -> Header:
    """Raises ``UserError`` for a file that is not there, is not whole, or is none of ``Dump``'s."""
    try:
        with safe_open(path, "pt") as file:
            return _header(path, file)
    except (OSError, SafetensorError) as error:
        raise UserError(OPTION, f"{path} cannot be read ({error})", DAMAGED) from error


def read_batch(path: Path, vocab: int) -> dict[str, tuple[list[int], Sampled]]:
    """Key -> (prompt, what was sampled). Raises ``UserError`` as ``read_header``, and for ids that are not below ``vocab``."""
    try:
        with safe_open(path, "pt") as file:
            header = _header(path, file)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except (OSError, SafetensorError) as error:
        raise UserError(OPTION, f"{path} cannot be read ({error})", DAMAGED) from error
    try:
        prompts = tensors["prompt_ids"].split(tensors["prompt_lengths"].tolist())
        lengths = tensors["response_lengths"].tolist()
        responses, finished = tensors["response_ids"].split(lengths), tensors["finished"].tolist()
        log_probs = tensors[LOG_PROBS].split(lengths) if header.has_log_probs else [None] * len(lengths)
        ids = torch.cat([tensors["prompt_ids"], tensors["response_ids"]])
        if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < vocab:
            raise ValueError(f"token ids from {int(ids.min())} to {int(ids.max())} in a vocabulary of {vocab}")
        return {
            key: (prompt.tolist(), Sampled(body.tolist(), ended, None if values is None else values.tolist()))
            for key, prompt, body, ended, values in zip(
                header.keys, prompts, responses, finished, log_probs, strict=True
            )
        }
    except (KeyError, ValueError, RuntimeError) as error:
        raise UserError(OPTION, f"{path} contradicts itself ({error})", DAMAGED) from error


def _header(path: Path, file) -> Header:
    try:
        header = json.loads((file.metadata() or {})[HEADER])
        return Header(dict(header["facts"]), list(header["keys"]), LOG_PROBS in file.keys())  # noqa: SIM118
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(OPTION, f"{path} is not a file of rollout.dump", "give the directory that it wrote") from error


def _ints(values: list[int]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)
