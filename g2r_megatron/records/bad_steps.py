"""RUN/bad_steps/: the batches of training steps whose loss or gradients were not finite, to be looked at."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import save_file

from g2r_megatron.errors import unwritable
from g2r_megatron.records.files import make_directory, replace_text

DIRECTORY = "bad_steps"


class Batch(Protocol):
    """What is written of a step's batch (experience.py): N entries in each list."""

    queries: Sequence[Any]
    keys: Sequence[str]
    responses: Sequence[Any]
    judgements: Sequence[Sequence[Any]]
    advantages: list[torch.Tensor]

    def reward(self, i: int) -> float: ...


def write_bad_step(
    output_dir: Path,
    step: int,
    batch: Batch,
    old: list[torch.Tensor],
    reference: list[torch.Tensor] | None,
    metrics: dict[str, float],
) -> Path:
    """Write the batch of ``step`` as step_X.safetensors and step_X.json; the path of the first.

    Tensors, responses one after another: ``prompt_ids`` and ``response_ids`` int32 with ``prompt_lengths`` and
    ``response_lengths`` int32 [N], and a value a response token of ``advantages``, ``old_log_probs`` and (with a KL
    penalty) ``reference_log_probs`` fp32. The JSON file has each response's query, key, text, reward and verdicts, and
    the step's metrics. Raises ``UserError`` when the disk refuses.
    """
    make_directory(output_dir / DIRECTORY)
    path = output_dir / DIRECTORY / f"step_{step:08d}.safetensors"
    tensors = {"advantages": torch.cat(batch.advantages).float(), "old_log_probs": torch.cat(old).float()}
    if reference is not None:
        tensors["reference_log_probs"] = torch.cat(reference).float()
    for name, parts in (
        ("prompt", [r.prompt_ids for r in batch.responses]),
        ("response", [r.token_ids for r in batch.responses]),
    ):
        tensors[f"{name}_ids"] = torch.tensor([i for part in parts for i in part], dtype=torch.int32)
        tensors[f"{name}_lengths"] = torch.tensor([len(part) for part in parts], dtype=torch.int32)
    responses = [
        {
            "query_id": query.id,
            "key": key,
            "response": response.text,
            "reward": batch.reward(i),
            "verdicts": [judgement.verdict for judgement in batch.judgements[i]],
        }
        for i, (query, key, response) in enumerate(zip(batch.queries, batch.keys, batch.responses, strict=True))
    ]
    try:
        save_file(tensors, path)
    except OSError as error:
        raise unwritable(path, error) from error
    plain = {name: str(value) for name, value in metrics.items()}  # JSON has no NaN
    replace_text(path.with_suffix(".json"), json.dumps({"step": step, "metrics": plain, "responses": responses}))
    return path
