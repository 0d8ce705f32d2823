"""What Weights & Biases will do in this environment, found out before anything is loaded: online, offline, not at all.

As W&B itself decides (https://docs.wandb.ai/ref/environment_variables): the environment before the settings files
(./wandb/settings, then ~/.config/wandb/settings), the key also from netrc.
"""

import configparser
import netrc
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

from g2r_megatron.errors import UserError, warn

DEFAULT_URL = "https://api.wandb.ai"
OFF = "set WANDB_MODE=offline and sync later, or set log.wandb false"
Mode = Literal["online", "offline", "disabled"]
MODES: dict[str, Mode] = {
    "online": "online",
    "run": "online",
    "shared": "online",
    "offline": "offline",
    "dryrun": "offline",
}


def wandb_setting(name: str, environment: Mapping[str, str] = os.environ) -> str | None:
    """A W&B setting (``mode``, ``base_url``, ``api_key``, ...); None where nobody has set it."""
    if value := environment.get(f"WANDB_{name.upper()}"):
        return value
    home = Path(
        environment.get("WANDB_CONFIG_DIR") or Path(environment.get("HOME", "~")).expanduser() / ".config/wandb"
    )
    for file in (Path(environment.get("WANDB_DIR", ".")) / "wandb/settings", home / "settings"):
        parser = configparser.ConfigParser(interpolation=None)
        try:
            parser.read(file, encoding="utf-8")
            value = parser.get("default", name, fallback=None)
        except (configparser.Error, UnicodeDecodeError, OSError) as error:
            raise UserError("log.wandb", f"W&B's {file} cannot be read ({error})", "correct or remove it") from error
        if value:
            return value
    return None


def wandb_mode(environment: Mapping[str, str] = os.environ) -> Mode:
    """``online``, ``offline`` or ``disabled``."""
    if environment.get("WANDB_DISABLED", "").lower() in ("true", "1"):
        return "disabled"
    return MODES.get(wandb_setting("mode", environment) or "online", "disabled")


def wandb_host(environment: Mapping[str, str] = os.environ) -> tuple[str, int]:
    """Name and port of the W&B server."""
    url = urlsplit(wandb_setting("base_url", environment) or DEFAULT_URL)
    if not url.hostname:
        raise UserError("WANDB_BASE_URL", repr(url.geturl()), f"must be an address such as {DEFAULT_URL}")
    return url.hostname, url.port or (80 if url.scheme == "http" else 443)


def check_wandb_login(environment: Mapping[str, str] = os.environ) -> None:
    """Raise ``UserError`` if W&B would ask for a login; warn where it will not be online. For ``log.wandb``."""
    mode = wandb_mode(environment)
    if mode == "disabled":
        raise UserError("log.wandb", "true, but the environment disables W&B (WANDB_MODE, WANDB_DISABLED)", OFF)
    if mode == "offline":
        warn("W&B is offline: send the run later with `wandb sync OUTPUT_DIR/wandb/offline-run-*`")
        return
    host, _ = wandb_host(environment)
    if not (_has_key(environment) or _netrc_has(host, environment)):
        raise UserError(
            "log.wandb",
            f"true, but there is no login: no WANDB_API_KEY, no entry for {host} in netrc",
            f"run `wandb login`, {OFF}",
        )


def _has_key(environment: Mapping[str, str]) -> bool:
    return any(wandb_setting(name, environment) for name in ("api_key", "identity_token_file"))


def _netrc_has(host: str, environment: Mapping[str, str]) -> bool:
    home = Path(environment.get("HOME", "~")).expanduser()
    files = [Path(environment["NETRC"])] if environment.get("NETRC") else [home / ".netrc", home / "_netrc"]
    for file in files:
        if not file.is_file():
            continue
        try:
            return host in netrc.netrc(str(file)).hosts
        except (netrc.NetrcParseError, OSError, UnicodeDecodeError) as error:
            raise UserError(
                "log.wandb", f"{file} cannot be read ({error})", "correct it, or set WANDB_API_KEY"
            ) from error
    return False
