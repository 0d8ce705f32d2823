"""Where the results of evaluations are, and reading them: of ``g2r eval``, and of a training's held-out rows.

A directory holds ``responses.jsonl`` (one record a line), ``eval.json`` (the summary, and what was evaluated on what by
whom) and ``eval.html``.
"""

import json
import re
from pathlib import Path

from g2r_megatron.errors import UserError

RESPONSES, SUMMARY, PAGE = "responses.jsonl", "eval.json", "eval.html"
STEP_NAME = re.compile(r"step_(\d{8})")


def step_directory(run: Path, step: int) -> Path:
    """Where a training has its evaluation after ``step``."""
    return run / "eval" / f"step_{step:08d}"


def evaluated_steps(run: Path) -> list[int]:
    """The steps of a training whose evaluations are complete, ascending."""
    found = ((STEP_NAME.fullmatch(file.parent.name), file) for file in (run / "eval").glob(f"*/{SUMMARY}"))
    return sorted(int(match[1]) for match, file in found if match and (file.parent / RESPONSES).is_file())


def read_results(directory: Path) -> tuple[dict, list[dict]]:
    """(eval.json, records) of a directory of results. Raises ``UserError`` for any other."""
    remedy = "give the output of a finished g2r eval, or RUN/eval/step_... of a training"
    for name in (SUMMARY, RESPONSES):
        if not (directory / name).is_file():
            raise UserError(str(directory), f"no {name} in it", remedy)
    try:
        found = json.loads((directory / SUMMARY).read_text(encoding="utf-8"))
        lines = (directory / RESPONSES).read_text(encoding="utf-8").split("\n")
        return found, [json.loads(line) for line in lines if line]
    except ValueError as error:
        raise UserError(str(directory), f"broken ({error})", remedy) from error
