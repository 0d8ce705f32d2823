"""The Weights & Biases run of a training: it never ends the training, except for a login that is refused at its start."""

import os
import secrets
import socket
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from g2r_megatron.config.options import LogConfig
from g2r_megatron.config.trackers import OFF, Mode, wandb_host, wandb_mode
from g2r_megatron.errors import UserError, warn

ID_FILE = "wandb_id"
CONNECT_SECONDS = 5.0
LATER = "the run is kept offline: send it later with `wandb sync OUTPUT_DIR/wandb/offline-run-*`"


def check_wandb_session(log: LogConfig) -> None:
    """Before weights are read, on the first rank: raise ``UserError`` if the server refuses the login."""
    if not log.wandb or os.environ.get("RANK", "0") != "0" or _mode() != "online":
        return
    import wandb

    try:
        wandb.login(verify=True)
    except (wandb.errors.AuthenticationError, wandb.errors.UsageError, ValueError) as error:
        raise _refused(error) from error
    except wandb.errors.CommError as error:
        warn(f"W&B does not answer ({_first_line(error)})")


def reachable(host: str, port: int) -> bool:
    """Whether a connection can be made, to the proxy if there is one: a compute node often has no way out."""
    proxy = os.environ.get("HTTPS_PROXY") or os.environ.get("https_proxy")
    if proxy and (parts := urlsplit(proxy if "//" in proxy else f"//{proxy}")).hostname:
        host, port = parts.hostname, parts.port or 80
    try:
        socket.create_connection((host, port), timeout=CONNECT_SECONDS).close()
    except OSError:
        return False
    return True


def _mode() -> Mode:
    """W&B's mode here. Where the server cannot be reached it is offline, with a warning."""
    mode = wandb_mode()
    if mode == "online" and not reachable(*wandb_host()):
        warn(f"W&B's server {wandb_host()[0]} cannot be reached: {LATER}")
        return "offline"
    return mode


class WandbRun:
    """A W&B run that a resumed training continues: its id is kept in the run directory."""

    def __init__(self, output_dir: Path, project: str, config_dict: dict):
        """``config_dict``: kept beside the curves. Raises ``UserError`` when the server refuses the login."""
        import wandb

        id_file = output_dir / ID_FILE
        if not id_file.exists():
            id_file.write_text(secrets.token_hex(4))
        self._options: dict[str, Any] = dict(
            project=project,
            name=output_dir.name,
            id=id_file.read_text().strip(),
            resume="allow",
            config=config_dict,
            dir=str(output_dir),
        )
        try:
            self._run = wandb.init(mode=_mode(), **self._options)
        except (wandb.errors.AuthenticationError, wandb.errors.UsageError) as error:
            raise _refused(error) from error
        except wandb.errors.CommError as error:  # a server that is slow or down
            warn(f"W&B does not answer ({_first_line(error)}): {LATER}")
            self._run = wandb.init(mode="offline", **self._options)

    def log(self, step: int, values: dict[str, float]) -> None:
        """Add the values of ``step``. Where W&B fails, the training goes on without it, after a warning."""
        if self._run is None:
            return
        try:
            self._run.log(values, step=step)
        except Exception as error:  # W&B's own process has died: metrics.jsonl and TensorBoard have the numbers
            warn(f"W&B has failed ({type(error).__name__}: {_first_line(error)}): no more is sent to it")
            self._run = None

    def close(self) -> None:
        """Send what is left."""
        if self._run is not None:
            self._run.finish()
            self._run = None


def _refused(error: Exception) -> UserError:
    return UserError("log.wandb", f"W&B refuses the login ({_first_line(error)})", f"run `wandb login`, {OFF}")


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
