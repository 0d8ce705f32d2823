"""The progress line while tensors are copied or compared: tensors, bytes, GB/s and the time that is left."""

import sys
import time
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, SpinnerColumn, TaskID, TextColumn
from rich.progress import Progress as RichProgress

from g2r_megatron.records.progress_bar import format_seconds

SECONDS_BETWEEN_LINES = 5.0  # in a pipe or a Slurm log


class CopyProgress:
    """A live line on a terminal; elsewhere a plain line every few seconds and one at the end, without control codes.

    Each process counts its own share. The shares are equal in bytes, so the first process's share represents all.

    >>> with CopyProgress("convert", tensors=291, nbytes=3 * 10**9, share=10**9, enabled=rank == 0) as progress:
    ...     progress.add(2**20)
    """

    def __init__(self, phase: str, tensors: int, nbytes: int, share: int, enabled: bool):
        """``tensors``, ``nbytes``: of all processes; ``share``: bytes of this one; ``enabled``: writes at all."""
        self._phase, self._tensors, self._nbytes, self._share = phase, tensors, nbytes, max(share, 1)
        self._enabled = enabled
        self._done = 0  # bytes of this process
        self._started = self._printed = 0.0
        self._live: RichProgress | None = None
        self._task: TaskID | None = None

    def __enter__(self) -> Self:
        self._started = self._printed = time.monotonic()
        if self._enabled and sys.stdout.isatty():
            self._live = RichProgress(
                SpinnerColumn(),
                TextColumn("{task.fields[phase]}", style="bold"),
                BarColumn(bar_width=24),
                TextColumn("{task.fields[status]}", markup=False),
                console=Console(file=sys.stdout, force_terminal=True, highlight=False),
            )
            self._task = self._live.add_task("", total=self._share, phase=self._phase, status="")
            self._live.start()
        return self

    def __exit__(self, kind, *exc_info) -> None:
        if self._live is not None:
            self._live.stop()
        if self._enabled and kind is None:
            seconds = time.monotonic() - self._started
            rate = self._nbytes / max(seconds, 1e-9) / 1e9
            size = f"{self._tensors} tensors, {format_bytes(self._nbytes)}"
            print(f"{self._phase}: {size} in {format_seconds(seconds)} ({rate:.2f} GB/s)", flush=True)

    def add(self, nbytes: int) -> None:
        """``nbytes`` more of this process's share are done."""
        self._done += nbytes
        if not self._enabled:
            return
        now = time.monotonic()
        if self._live is not None:
            self._live.update(self._task, completed=self._done, status=self._status(now))
        elif now - self._printed >= SECONDS_BETWEEN_LINES:
            self._printed = now
            print(f"{self._phase}: {self._status(now)}", flush=True)

    def _status(self, now: float) -> str:
        part = min(self._done / self._share, 1.0)
        seconds = max(now - self._started, 1e-9)
        left = format_seconds(seconds * (1 - part) / max(part, 1e-9))
        return (
            f"{int(part * self._tensors)}/{self._tensors} tensors  "
            f"{format_bytes(part * self._nbytes)}/{format_bytes(self._nbytes)}  "
            f"{part * self._nbytes / seconds / 1e9:.2f} GB/s  ETA {left}"
        )


def format_bytes(count: float) -> str:
    """``3.1 GB``, in powers of a thousand as disks are sold."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"
