"""The records of a run: metrics.jsonl and samples.jsonl, TensorBoard and, when asked for, W&B."""

import json
import math
from pathlib import Path
from typing import Any

from g2r_megatron.config.options import LogConfig
from g2r_megatron.errors import UserError, unwritable
from g2r_megatron.records.files import make_directory, replace_text
from g2r_megatron.records.wandb_run import WandbRun

METRICS_FILE = "metrics.jsonl"
SAMPLES_FILE = "samples.jsonl"
ALARMS_FILE = "alarms.jsonl"


class MetricsLog:
    """The records of one run. Construct it on rank 0 only.

    ``metrics.jsonl`` holds one object a line, ``step`` first; a value that is not finite is written as
    ``null`` (JSON has no NaN). Each line is written when ``log`` returns, so a killed run
    loses at most a torn last line, which readers ignore and ``truncate_after`` removes.
    """

    def __init__(self, output_dir: str | Path, log: LogConfig, config_dict: dict):
        """``config_dict``: the resolved config as plain data, kept by W&B beside the curves.

        The packages that ``log`` asks for are installed (config/checks.py).
        """
        self.output_dir = Path(output_dir)
        make_directory(self.output_dir)
        self._wants_tensorboard = log.tensorboard
        self._tensorboard: Any = None  # opened by the first log: only then is it known from which step on to purge
        self._wandb = WandbRun(self.output_dir, log.wandb_project, config_dict) if log.wandb else None

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Append the metrics (numbers or one-element tensors) of ``step`` everywhere."""
        values = {key: float(value) for key, value in metrics.items()}
        _append(self.output_dir / METRICS_FILE, {"step": int(step), **values})
        if self._wants_tensorboard:
            self._log_tensorboard(step, values)
        if self._wandb is not None:
            self._wandb.log(step, values)

    def sample(self, record: dict) -> None:
        """Append one judged response (a dict with ``step``, see the report) to samples.jsonl."""
        _append(self.output_dir / SAMPLES_FILE, record)

    def alarm(self, record: dict) -> None:
        """Append an alarm that went on (a dict with ``step``, see the report) to alarms.jsonl."""
        _append(self.output_dir / ALARMS_FILE, record)

    def truncate_after(self, step: int) -> None:
        """Remove what was recorded after ``step``: call it when training resumes from the checkpoint of ``step``.

        Each file is replaced atomically; -1 empties them. A torn last line goes too.
        """
        for name in (METRICS_FILE, SAMPLES_FILE, ALARMS_FILE):
            path = self.output_dir / name
            if path.exists():
                kept = [record for record in read_jsonl(path) if record["step"] <= step]
                replace_text(path, "".join(map(_line, kept)), sync=True)

    def close(self) -> None:
        """Flush and close TensorBoard and W&B."""
        if self._tensorboard is not None:
            self._tensorboard.close()
            self._tensorboard = None
        if self._wandb is not None:
            self._wandb.close()
            self._wandb = None

    def _log_tensorboard(self, step: int, values: dict[str, float]) -> None:
        if self._tensorboard is None:
            from torch.utils.tensorboard import SummaryWriter  # slow to import

            # purge_step hides what an interrupted run had logged from here on
            self._tensorboard = SummaryWriter(str(self.output_dir / "tensorboard"), purge_step=step)
        for key, value in values.items():
            self._tensorboard.add_scalar(key, value, step)
        self._tensorboard.flush()


def read_metrics(run_dir: str | Path) -> list[dict]:
    """The lines of a run's metrics.jsonl in file order; ``null`` (a value that was not finite) is None.

    Raises UserError when the directory or the file is missing, or a line is not JSON with a ``step``.
    """
    return read_jsonl(_existing(run_dir, METRICS_FILE))


def read_samples(run_dir: str | Path) -> list[dict]:
    """The lines of a run's samples.jsonl in file order; none when it logged no samples."""
    path = Path(run_dir) / SAMPLES_FILE
    return read_jsonl(path) if path.exists() else []


def read_alarms(run_dir: str | Path) -> list[dict]:
    """The lines of a run's alarms.jsonl in file order; none when no alarm went on."""
    path = Path(run_dir) / ALARMS_FILE
    return read_jsonl(path) if path.exists() else []


def read_jsonl(path: Path) -> list[dict]:
    """The records of a file of ours. A last line without its newline was torn by a kill and is left out."""
    complete = path.read_text(encoding="utf-8").split("\n")[:-1]
    return [_parse(line, f"{path}:{number}") for number, line in enumerate(complete, 1) if line.strip()]


def _parse(line: str, where: str) -> dict:
    remedy = "delete the line, or the run directory"
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(where, f"broken JSON ({error.msg})", remedy) from error
    if not isinstance(record, dict) or type(record.get("step")) is not int:
        raise UserError(where, "no integer 'step'", remedy)
    return record


def _existing(run_dir: str | Path, name: str) -> Path:
    run_dir = Path(run_dir)
    if not run_dir.is_dir():
        raise UserError(str(run_dir), "no such run directory", "give the output_dir of a g2r train run")
    if not (run_dir / name).is_file():
        raise UserError(str(run_dir), f"no {name} in it", "give the output_dir of a g2r train run that has made a step")
    return run_dir / name


def _append(path: Path, record: dict) -> None:
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(_line(record))
    except OSError as error:
        raise unwritable(path, error) from error


def _line(record: dict) -> str:
    return json.dumps(_finite(record), allow_nan=False) + "\n"


def _finite(value):
    """Plain JSON data with every float that is not finite replaced by None."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
