"""RUN/bad_steps/: the batches of training steps whose loss or gradients were not finite, for a person to inspect."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from g2r_megatron.errors import unwritable
from g2r_megatron.records.files import make_directory, replace_text

DIRECTORY = "bad_steps"


def write_bad_step(
    output_dir: Path, step: int, tensors: dict[str, torch.Tensor], responses: list[dict], metrics: dict[str, float]
) -> Path:
    """Write the batch of ``step`` as step_X.safetensors and step_X.json; the path of the first.

    ``tensors`` and ``responses``: experience.plain_batch. The JSON file holds the responses and the step's metrics.
    Raises ``UserError`` when the disk refuses.
    """
    make_directory(output_dir / DIRECTORY)
    path = output_dir / DIRECTORY / f"step_{step:08d}.safetensors"
    try:
        save_file(tensors, path)
    except OSError as error:
        raise unwritable(path, error) from error
    plain = {name: str(value) for name, value in metrics.items()}  # JSON has no NaN
    replace_text(path.with_suffix(".json"), json.dumps({"step": step, "metrics": plain, "responses": responses}))
    return path
