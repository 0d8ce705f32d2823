"""What `make test` runs: the whole suite, with the tests that wait for Slurm beside those that compute. Not a test.

    python tests/suite.py [arguments of pytest, for both]

The tests of tests/slurm mostly wait, one after the other, for jobs of one cluster. They are a process of their own, whose
output is shown at the end; all others share two processes. The exit code is that of the first part that failed.
"""

import subprocess
import sys
import tempfile
from pathlib import Path

PYTEST = [sys.executable, "-m", "pytest", "--durations=15"]
WORKERS = ["-n", "2", "--dist", "loadgroup", "--no-loadscope-reorder"]


def main(arguments: list[str]) -> int:
    chosen = any(Path(argument.partition("::")[0]).exists() for argument in arguments)
    # each part imports the files of its own tests only
    slurm, others = ([], []) if chosen else (["tests/slurm"], ["--ignore=tests/slurm"])
    with tempfile.TemporaryFile("w+") as output:
        waiting = subprocess.Popen(
            [*PYTEST, "-m", "slurm", *slurm, *arguments], stdout=output, stderr=subprocess.STDOUT
        )
        try:
            code = subprocess.run([*PYTEST, *WORKERS, "-m", "not slurm", *others, *arguments]).returncode
            print("\nThe tests of tests/slurm, which ran meanwhile:", flush=True)
            slurm_code = waiting.wait()
        finally:
            waiting.terminate()
        output.seek(0)
        print(output.read(), flush=True)
    no_tests = 5  # where the arguments choose tests of one part alone
    return next((found for found in (code, slurm_code) if found not in (0, no_tests)), 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
