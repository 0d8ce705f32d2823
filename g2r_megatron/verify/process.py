"""Programs that judge answers, in processes of their own with limits of time and memory."""

import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress

from g2r_megatron.errors import RunError

# Sets the limit in the new process, then becomes the command: no code of ours runs between fork and exec.
LIMITED = """
import os, resource, sys
size = int(sys.argv[1])
resource.setrlimit(resource.RLIMIT_AS, (size, size))
os.execvp(sys.argv[2], sys.argv[2:])
"""
START_SECONDS = 120.0  # to import sympy on a machine that is busy


def limited(command: Sequence[str], memory_mib: int) -> list[str]:
    """``command`` with so much address space."""
    return [sys.executable, "-I", "-S", "-c", LIMITED, str(memory_mib << 20), *command]


def exit_code(command: Sequence[str], stdin: str, seconds: float, memory_mib: int) -> int | None:
    """How ``command`` ended with ``stdin`` (its output is dropped); None if it was ended after ``seconds``."""
    process = subprocess.Popen(
        limited(command, memory_mib),
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    )
    try:
        process.communicate(stdin, timeout=seconds)
        return process.returncode
    except subprocess.TimeoutExpired:
        return None
    finally:
        _end(process)


def _end(process: subprocess.Popen) -> None:
    """End a process and what it has started."""
    with suppress(ProcessLookupError):  # it has ended by itself
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


class MathWorker:
    """math-verify in a process that is started when it is needed, and again after an answer that took too long."""

    def __init__(self, seconds: float, memory_mib: int):
        """``seconds``: an answer may take."""
        self.seconds, self.memory_mib = seconds, memory_mib
        self._process: subprocess.Popen | None = None

    def same(self, expected: str, found: str) -> bool | None:
        """Whether both are the same value; None if that took too long, or too much memory."""
        process = self._process or self._start()
        assert process.stdin is not None
        try:
            process.stdin.write(json.dumps([expected, found]) + "\n")
            process.stdin.flush()
        except BrokenPipeError:
            self.close()
            return None
        line = self._line(process, self.seconds)
        if not line:
            self.close()
            return None
        return bool(json.loads(line))

    def _start(self) -> subprocess.Popen:
        command = limited([sys.executable, "-m", "g2r_megatron.verify.math_worker"], self.memory_mib)
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1, start_new_session=True
        )
        self._process = process
        if self._line(process, START_SECONDS) != "ready\n":
            self.close()
            raise RunError("verifier.kind: the process of math-verify did not start; see its error above")
        return process

    @staticmethod
    def _line(process: subprocess.Popen, seconds: float) -> str:
        """The next line of its output; empty if it ends, or if none comes. It writes whole lines, one a question."""
        assert process.stdout is not None
        ready, _, _ = select.select([process.stdout], [], [], seconds)
        return process.stdout.readline() if ready else ""

    def close(self) -> None:
        """End the process."""
        if self._process is not None:
            _end(self._process)
            self._process = None
