"""The output of ``g2r judge`` is whole or absent, and the same bytes however often its writer was killed.

A kill leaves a prefix of what was written (the files are cut at every byte here; real kills are in tests/slurm);
leaves out a disk that reorders writes within a batch. Its columns are what ``datasets`` loads.
"""

import json
import os
from pathlib import Path

import pytest

from g2r_megatron.config.command_options import OfflineJudgeConfig
from g2r_megatron.data.readers import read_queries
from g2r_megatron.errors import UserError
from g2r_megatron.judge.columns import check_ids, write_parquet
from g2r_megatron.judge.offline import judge_file
from g2r_megatron.judge.output_file import job_key, join_parts, part_path, partial_file, partial_path, share_of
from test_offline_judge import ROWS, config_for, write_rows

RECORDS = [{"id": f"row {i}", "reward": i / 4} for i in range(5)]
IDS = [record["id"] for record in RECORDS]


def write(path: Path, records=RECORDS, key: str = "key", batch: int = 2) -> int:
    """Write what is missing of ``records`` and complete the file; how many rows were there."""
    with partial_file(path, key, IDS, batch) as file:
        before = len(file.rewards)
        assert file.rewards == [record["reward"] for record in records[:before]]
        for first in range(before, len(records), batch):
            file.write(records[first : first + batch])
        file.complete()
    return before


def lines(records=RECORDS) -> bytes:
    return "".join(json.dumps(record) + "\n" for record in records).encode()


@pytest.mark.parametrize("tail", [b"", b"\0" * 40])
def test_cut_at_every_byte(tmp_path, tail):
    """Whole batches are kept, nothing else; what comes out is the same. A tail of zeros: blocks never written."""
    path = tmp_path / "out.jsonl"
    head = b'{"job": "key"}\n'
    whole = head + lines()
    for cut in range(len(head), len(whole) + 1):
        partial_path(path).write_bytes(whole[:cut] + tail)
        rows = whole[len(head) : cut].count(b"\n")
        assert write(path) == (rows if rows == 5 else rows // 2 * 2)
        assert path.read_bytes() == lines()
        assert [file.name for file in tmp_path.iterdir()] == ["out.jsonl"]


def test_a_line_of_another_row_ends_what_is_kept(tmp_path):
    path = tmp_path / "out.jsonl"
    partial_path(path).write_bytes(b'{"job": "key"}\n' + lines([*RECORDS[:2], RECORDS[3], RECORDS[2]]))
    assert write(path) == 2 and path.read_bytes() == lines()


def test_another_jobs_partial_file_is_refused_and_left(tmp_path):
    path = tmp_path / "out.jsonl"
    begun = b'{"job": "key"}\n' + lines(RECORDS[:2])
    partial_path(path).write_bytes(begun)
    with pytest.raises(UserError, match="begun with other options or rows"):
        write(path, key="other")
    assert partial_path(path).read_bytes() == begun
    assert [file.name for file in tmp_path.iterdir()] == [partial_path(path).name]


def test_nothing_is_left_before_the_first_row(tmp_path):
    with pytest.raises(ValueError), partial_file(tmp_path / "out.jsonl", "key", IDS, 2):
        raise ValueError
    assert not list(tmp_path.iterdir())


def test_a_process_that_was_given_up_can_no_longer_write(tmp_path):
    """The next attempt takes over: what the first one still writes goes nowhere, and it cannot complete the file."""
    path = tmp_path / "out.jsonl"
    with partial_file(path, "key", IDS, 2) as old:
        old.write(RECORDS[:2])
        with partial_file(path, "key", IDS, 2) as new:
            old.write(RECORDS[2:4])
            with pytest.raises(UserError, match="another process"):
                old.complete()
            new.write(RECORDS[2:4])
            new.write(RECORDS[4:])
            new.complete()
        with pytest.raises(UserError, match="another process"):
            old.complete()
    assert path.read_bytes() == lines()


def test_parts_are_joined_by_the_last_in_order(tmp_path):
    output = tmp_path / "out.jsonl"
    for shard in (2, 0, 1):
        assert not join_parts(output, 3)
        part = part_path(output, shard, 3)
        part.parent.mkdir(exist_ok=True)
        part.write_bytes(lines([RECORDS[i] for i in share_of(5, shard, 3)]))
    assert join_parts(output, 3) and join_parts(output, 3)
    assert output.read_bytes() == lines()
    assert [file.name for file in tmp_path.iterdir()] == ["out.jsonl"]


@pytest.mark.parametrize(("count", "shards"), [(1, 1), (5, 3), (7, 7), (100, 16)])
def test_shares(count, shards):
    shares = [share_of(count, shard, shards) for shard in range(shards)]
    assert [i for share in shares for i in share] == list(range(count))
    assert {len(share) for share in shares} <= {count // shards, -(-count // shards)}


def test_three_jobs_write_the_file_of_one(tiny_hf, worlds, tmp_path):
    """Bit for bit when rows are judged one at a time; a finished share is not judged again, a cut one goes on."""
    rows = write_rows(tmp_path / "rows.jsonl", ROWS)
    alone, output = tmp_path / "alone.jsonl", tmp_path / "out.jsonl"
    worlds[1].run(judge_file, config_for(tiny_hf("qwen2"), rows, alone, batch_rows=1))

    def judge(shard: int, model: Path | None = None) -> None:
        model = model or tiny_hf("qwen2")
        worlds[1].run(judge_file, config_for(model, rows, output, batch_rows=1, shard=shard, shards=3))

    judge(2)
    last = part_path(output, 2, 3)
    made = last.read_bytes()
    last.unlink()
    kill_in_second_row(output, made, config_for(tiny_hf("qwen2"), rows, output, shard=2, shards=3))
    judge(2)
    assert last.read_bytes() == made
    inode = last.stat().st_ino
    judge(2)
    assert last.stat().st_ino == inode
    judge(0)
    judge(1)
    assert output.read_bytes() == alone.read_bytes()
    judge(1, model=Path("/nowhere"))  # all is done: nothing is opened
    assert sorted(os.listdir(tmp_path)) == ["alone.jsonl", "out.jsonl", "rows.jsonl"]


def kill_in_second_row(output: Path, made: bytes, config: OfflineJudgeConfig) -> None:
    """Leave the partial file of a share whose writer was killed while it wrote its second row."""
    queries = read_queries([config.input], config.format, config.polarity, require_response=True)
    key = job_key(config, [queries[i] for i in share_of(len(queries), config.shard, config.shards)])
    first, rest = made.split(b"\n", 1)
    content = json.dumps({"job": key}).encode() + b"\n" + first + b"\n" + rest[:20]
    partial_path(part_path(output, config.shard, config.shards)).write_bytes(content)


def loaded(path: Path, cache: Path) -> list[dict]:
    """The rows as ``datasets`` gives them."""
    from datasets import load_dataset

    return load_dataset("parquet", data_files=str(path), split="train", cache_dir=str(cache)).to_list()


def test_columns_hold_what_the_lines_do(tiny_hf, worlds, tmp_path):
    """Judged in two shares, the last first: ids, order and numbers of the lines; earlier results are in ``given``."""
    rows = [{**row, "id": 7 - i, "grade": "B"} for i, row in enumerate(ROWS)]
    path = write_rows(tmp_path / "rows.jsonl", rows)

    def judge(name: str, **options) -> Path:
        options |= {"dump_inputs": False, "shards": 2}
        for shard in (1, 0):
            worlds[1].run(judge_file, config_for(tiny_hf("qwen2"), path, tmp_path / name, shard=shard, **options))
        return tmp_path / name

    lines = [json.loads(line) for line in judge("lines").read_text().splitlines()]
    parquet = judge("parquet", format_out="parquet")
    assert sorted(os.listdir(tmp_path)) == ["lines", "parquet", "rows.jsonl"]
    columns = loaded(parquet, tmp_path / "cache")
    for line, found in zip(lines, columns, strict=True):
        items = [item | {"given": None} for item in line["items"]]
        assert json.loads(found.pop("given")) == {"grade": line.pop("grade")}
        assert found == {**line, "choice": None, "items": items}
    trl = loaded(judge("trl", format_out="trl"), tmp_path / "cache")
    for row, line, found in zip(rows, columns, trl, strict=True):
        assert found.pop("prompt") == row["prompt"]
        assert found.pop("completion") == [{"role": "assistant", "content": row["response"]}]
        assert len(found.pop("completion_ids")) == len(found["token_rewards"])
        assert [item["criterion"] for item in found.pop("rubric")] == [item["criterion"] for item in row["rubric"]]
        found.pop("given")
        assert found == line


def test_columns_of_a_reward_model(tmp_path):
    """The score's own weights of tokens; numbers that are not finite, empty responses and fields of the row's own."""
    record = {"id": "a", "reward": -1.5, "tokens": ["x"], "token_rewards": [-1.5], "attribution": [2.0], "alpha": [1.0]}
    lists = {name: [] for name, value in record.items() if isinstance(value, list)}
    empty = record | lists | {"id": "b", "reward": None, "choice": 1, "given": {"a": [1, "b"]}}
    with (tmp_path / "out").open("wb") as target:
        write_parquet([json.dumps(one).encode() for one in (record, empty)], target, "parquet")
    assert loaded(tmp_path / "out", tmp_path / "cache") == [
        record | {"choice": None, "given": None}, empty | {"given": json.dumps({"given": {"a": [1, "b"]}})}
    ]  # fmt: skip


@pytest.mark.parametrize("ids", [["a", 1], [1, 0.5], [2**63]])
def test_ids_that_no_column_holds(ids):
    with pytest.raises(UserError, match="a column has one type"):
        check_ids(ids)
