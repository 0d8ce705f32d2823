"""A model directory by its path, or by a model's name on the Hugging Face Hub that was downloaded before."""

import re
from pathlib import Path

import huggingface_hub
from huggingface_hub import constants

from g2r_megatron.errors import UserError

HUB_NAME = re.compile(r"^(?:https://huggingface\.co/|hf://)?([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)/?$")


def find_directory(path: str, option: str) -> Path:
    """The directory that ``path`` names; nothing is downloaded.

    Raises ``UserError`` (naming ``option``) when there is none, for a Hub name with the command that downloads it.
    """
    if path and Path(path).is_dir():
        return Path(path)
    remedy = "must be a Hugging Face model directory (config.json, *.safetensors, tokenizer)"
    if path and Path(path).exists():
        raise UserError(option, f"{path} is a file", remedy)
    name = HUB_NAME.match(path or "")
    if name is None:
        raise UserError(option, repr(path), remedy)
    file = huggingface_hub.try_to_load_from_cache(name[1], "config.json", cache_dir=constants.HF_HUB_CACHE)
    if isinstance(file, str):
        return Path(file).parent
    found = f"{path!r} is neither a directory nor in the Hugging Face cache {constants.HF_HUB_CACHE}"
    raise UserError(option, found, f"if it is a model's name, download it with: hf download {name[1]}")
