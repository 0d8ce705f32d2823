"""Checks of what ``g2r serve`` is given, before anything is started."""

import os
from ipaddress import ip_address
from pathlib import Path

from g2r_megatron.config.checks import check_judge, check_judge_is_alone
from g2r_megatron.config.options import JudgeConfig
from g2r_megatron.config.presets import PRESETS, fill_from_preset
from g2r_megatron.config.ranges import SERVE_RANGES, check_file_can_be_made, check_ranges, require_given
from g2r_megatron.config.serve_options import API_KEY_VARIABLE, ServeConfig, ServiceConfig
from g2r_megatron.config.unused import warn_of_unused
from g2r_megatron.errors import UserError

SHORTEST_KEY = 16  # characters of an API key


def fill_judge(config: ServeConfig) -> ServeConfig:
    """``config``, whose judge has what it is not given from the preset."""
    config.judge = fill_from_preset(config.judge, PRESETS[config.preset]["judge"])
    return config


def check_serve_config(config: ServeConfig, world_size: int | None) -> None:
    """Raise ``UserError`` for the first thing in a resolved ``config`` that cannot work.

    ``world_size``: ranks of the judge; None in the HTTP front, which does not know how many its launcher starts.
    """
    require_given("judge.model", config.judge.model, "give the Hugging Face directory of the judge")
    check_ranges(config, SERVE_RANGES)
    check_judge_is_alone(config.judge, "g2r serve")
    layout = config.judge.layout
    check_judge(config.judge, layout.tp * layout.cp * layout.pp if world_size is None else world_size)
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
        check_file_can_be_made("serve.url_file", config.serve.url_file)


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
