"""The prompts of examples/smollm2 are what make_data.py writes, and every item's check can be met and missed.

Leaves out the model, and whether it improves on them (test_smollm2.py).
"""

import json
import re
from pathlib import Path

from scripts import load

EXAMPLE = Path(__file__).parents[2] / "examples" / "smollm2"


def test_make_data_writes_the_files_that_are_there(tmp_path, monkeypatch):
    (tmp_path / "data").mkdir()
    make_data = load("examples/smollm2/make_data.py")
    monkeypatch.setattr(make_data, "HERE", tmp_path)
    make_data.main()
    for name in ("train.jsonl", "eval.jsonl"):
        assert (tmp_path / "data" / name).read_bytes() == (EXAMPLE / "data" / name).read_bytes()


def test_no_check_is_met_by_nothing():
    for line in (EXAMPLE / "data" / "train.jsonl").read_text().splitlines():
        for item in json.loads(line)["rubric"]:
            if item["weight"] > 0:
                assert not re.search(item["check"], ""), item["criterion"]
