"""A model directory by its path, or by a model's name on the Hugging Face Hub that was downloaded before."""

import os
import re
from pathlib import Path

import huggingface_hub
from huggingface_hub import constants

from g2r_megatron.errors import UserError

HUB_NAME = re.compile(
    r"^(?:(?:https?://)?(?:huggingface\.co|hf\.co)/|hf://(?:models/)?)?(?P<name>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)"
    r"(?:(?:@|/(?:tree|blob|resolve)/)(?P<revision>[\w.-]+)(?:/.*)?)?/?$"
)
ADDRESS = re.compile(r"^[A-Za-z][A-Za-z0-9+.-]+:/")


def find_directory(path: str, option: str) -> Path:
    """The directory that ``path`` names; nothing is downloaded.

    "~" is the home directory, file:// may stand before a path. Raises ``UserError`` (naming ``option``) when there is no
    such directory, for a Hub name with the command that downloads it.
    """
    local = Path(os.path.expanduser((path or "").removeprefix("file://")))
    if path and local.is_dir():
        return local
    remedy = "must be a Hugging Face model directory (config.json, *.safetensors, tokenizer)"
    if path and local.exists():
        raise UserError(option, f"{path} is a file", f"{remedy}: give {local.parent} if it is one")
    name = HUB_NAME.match(path or "")
    if name is None and ADDRESS.match(path or ""):
        raise UserError(
            option, f"{path!r} is an address", "copy the model to this machine first, and give its directory"
        )
    if name is None:
        raise UserError(option, f"{path!r} is no directory", remedy)
    file = huggingface_hub.try_to_load_from_cache(
        name["name"], "config.json", cache_dir=constants.HF_HUB_CACHE, revision=name["revision"]
    )
    if isinstance(file, str):
        return Path(file).parent
    found = f"{path!r} is neither a directory nor in the Hugging Face cache {constants.HF_HUB_CACHE}"
    revision = f" --revision {name['revision']}" if name["revision"] else ""
    raise UserError(option, found, f"if it is a model's name, download it with: hf download {name['name']}{revision}")
