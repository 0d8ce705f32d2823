"""``g2r serve`` in processes of its own, for tests and benchmarks. Not a test."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
QUICKSTART = ROOT / "examples" / "quickstart" / "serve.yaml"
PATIENCE = 150.0  # seconds for anything to happen on a busy machine


class Service:
    """One service with the quickstart's judge on any free port; ``stop`` ends it."""

    def __init__(self, directory: Path, *options: str, **environment: str):
        self.url_file, self.log = directory / "url", directory / "serve.log"
        arguments = ["--config", str(QUICKSTART), "--serve.port", "0", "--serve.url_file", str(self.url_file), *options]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "g2r_megatron.cli", "serve", *arguments],
                cwd=ROOT, stdout=log, stderr=subprocess.STDOUT,
                env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **environment},
            )  # fmt: skip

    def url(self) -> str:
        """Where it is, once its judge answers."""
        self.wait(self.url_file.exists)
        return self.url_file.read_text().strip()

    def wait(self, happened) -> None:
        end = time.monotonic() + PATIENCE
        while not happened():
            assert self.process.poll() is None, f"ended with {self.process.returncode}:\n{self.log.read_text()}"
            assert time.monotonic() < end, f"not within {PATIENCE} s:\n{self.log.read_text()}"
            time.sleep(0.05)

    def ranks(self) -> dict[int, int]:
        """Rank -> process id of the judge's living ranks."""
        found = {}
        for entry in Path("/proc").iterdir():
            try:
                if entry.name.isdigit() and self._is_rank(entry):
                    variables = (entry / "environ").read_bytes().split(b"\0")
                    rank = next((v[5:] for v in variables if v.startswith(b"RANK=")), None)
                    if rank is not None or self._parent(entry) == self.process.pid:
                        found[int(rank or 0)] = int(entry.name)
            except OSError:  # ended meanwhile
                continue
        return found

    def _is_rank(self, entry: Path) -> bool:
        words = (entry / "cmdline").read_bytes().split(b"\0")
        ours = str(self.url_file).encode() in words
        return ours and b"torch.distributed.run" not in words and int(entry.name) != self.process.pid

    @staticmethod
    def _parent(entry: Path) -> int:
        return int((entry / "stat").read_text().rpartition(")")[2].split()[1])

    def stop(self) -> int:
        """SIGTERM; the exit code."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        return self.process.wait(PATIENCE)
