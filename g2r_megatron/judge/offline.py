"""The judge stage alone: it reads a file of responses and writes a file of judgements, attributions and token rewards.

One output line per response, in the order of the rows: ``id, reward, tokens, token_rewards, items``, and per item ``criterion, weight,
p_true, p_false, verdict, attribution, alpha`` (``attribution`` and ``alpha`` null where no backward ran: items judged
False or of weight 0). A reward model has no items: ``id, reward, tokens, token_rewards, attribution, alpha``. Lists run
over the T tokens of the response. The judge's fp32 results are written with 9 significant digits, which identify an
fp32 number. A value that is not finite is null. ``format_out`` parquet and trl: the same as columns (judge/columns.py).
"""

import os
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import fmean

import torch.distributed as dist

from g2r_megatron.config.command_options import OfflineJudgeConfig, OutputFormat, ProbeConfig
from g2r_megatron.credit.judgements import Alphas, JudgementRow, kind_of, plain_numbers
from g2r_megatron.data.readers import read_queries
from g2r_megatron.data.token_bound import most_tokens
from g2r_megatron.data.tokenizer import encode_text, token_texts
from g2r_megatron.data.types import Query
from g2r_megatron.errors import UserError, warn
from g2r_megatron.judge.columns import check_ids, fields_for_trl, write_parquet
from g2r_megatron.judge.frozen import FrozenJudge
from g2r_megatron.judge.health import JudgeHealth
from g2r_megatron.judge.length_bound import check_judge_positions
from g2r_megatron.judge.output_file import (
    PartialFile,
    Writer,
    check_parts,
    job_key,
    join_parts,
    part_path,
    partial_file,
    share_of,
    write_lines,
)
from g2r_megatron.judge.prompt import JudgePrompt
from g2r_megatron.judge.reward_prompt import RewardPrompt, judge_prompt
from g2r_megatron.judge.stage import JudgeStage
from g2r_megatron.judge.types import JudgeInput
from g2r_megatron.model.build import build_model
from g2r_megatron.model.hf import HFModel, load_model_tokenizer, open_hf_model
from g2r_megatron.parallel import groups
from g2r_megatron.records.progress_bar import CountProgress


@dataclass(frozen=True)
class Row:
    """A query with its response as token ids ([T], no stop token)."""

    query: Query
    body: list[int]


def judge_file(config: OfflineJudgeConfig) -> None:
    """Judge the rows of ``config.input``, or this job's share of them, and write them (collective; rank 0 writes).

    ``config`` is resolved (no None among the options that follow the preset) and has passed ``check_judge_config``.
    Raises ``UserError`` for bad rows, models, tokenizers or layouts before the weights are read. The output gets its
    name only when it is complete. Until then the next attempt continues it (judge/output_file.py).
    """
    output = Path(config.output)
    path = part_path(output, config.shard, config.shards)
    if config.shards > 1:
        check_parts(output, config.shards)
        if output.exists() or path.exists():
            finish(config, f"{output if output.exists() else path}: finished already")
            return
    hf = open_hf_model(config.judge.model, "judge.model")
    prompt = judge_prompt(hf, load_model_tokenizer(hf), config.judge)
    rows = read_rows(config, prompt)
    if config.format_out != "jsonl":
        check_ids([query.given.id for query in rows])
    rows = own_rows(config, rows)
    check_judge_positions(hf, config.judge, ((query, len(query.response.encode())) for query in rows))
    groups.initialize(config.seed)
    key, ids = job_key(config, rows), [query.given.id for query in rows]
    writes = dist.get_rank() == 0
    with partial_file(path, key, ids, config.batch_rows) if writes else nullcontext() as file:
        done = shared(len(file.rewards) if writes else None)
        health = judge_and_write(config, hf, prompt, rows, done, file)
        if writes:
            file.complete(write_lines if config.shards > 1 else writer_of(config))
            before = f" ({done} of them before)" if done else ""
            line = f"{path}: {len(rows)} rows{before}, mean reward {fmean(file.rewards):.3f}"
            finish(config, f"{line}, {health.passes} backward passes")
            if summary := health.summary():
                print(f"judge: {summary}", flush=True)
            for warning in health.warnings():
                print(f"g2r: warning: {warning}", file=sys.stderr, flush=True)


def judge_and_write(
    config: OfflineJudgeConfig,
    hf: HFModel,
    prompt: JudgePrompt | RewardPrompt,
    rows: list[Query],
    done: int,
    file: PartialFile | None,
) -> JudgeHealth:
    """Judge ``rows[done:]`` a batch at a time (collective); ``file``: on rank 0 what they are appended to.

    The health is that of the rows judged here, not of those ``done`` before.
    """
    layout = groups.build_groups("judge", config.judge.layout)
    model = build_model("judge", hf, layout, config.judge.precision, config.judge.recompute, config.judge.spec)
    judge = FrozenJudge(model, config.judge, prompt.true_ids, prompt.false_ids, prompt.null_id)
    stage = JudgeStage(judge, prompt, config.judge)
    health = JudgeHealth(config.judge.flat_threshold)
    with CountProgress("judged", "rows", len(rows), done, enabled=file is not None) as progress:
        for first in range(done, len(rows), config.batch_rows):
            queries = rows[first : first + config.batch_rows]
            batch = [Row(query, encode_text(prompt.tokenizer, query.response)) for query in queries]
            records = []
            for row, inputs, judgements in judge_rows(stage, batch, config.seed):
                alphas = stage.alphas(row.body, judgements, row_key(config.seed, row))
                health.count(row.query.id, judgements, alphas)
                records.append(output_record(stage, row, judgements, alphas, config.format_out))
                if config.dump_inputs:
                    add_inputs(records[-1], inputs, prompt)
            if file is not None:
                file.write(records)
            progress.done(first + len(batch))
    return health


def finish(config: OfflineJudgeConfig, line: str) -> None:
    """Say ``line``, and join the parts if this was the last one (rank 0)."""
    if int(os.environ.get("RANK", 0)) == 0:
        print(line, flush=True)
        before = Path(config.output).exists()
        if config.shards > 1 and join_parts(Path(config.output), config.shards, writer_of(config)) and not before:
            print(f"{config.output}: complete, {config.shards} parts joined", flush=True)


def writer_of(config: OfflineJudgeConfig) -> Writer:
    """What makes the output of its lines."""
    if config.format_out == "jsonl":
        return write_lines
    return partial(write_parquet, format_out=config.format_out)


def shared(count: int | None) -> int:
    """Rank 0's ``count`` on every rank (collective)."""
    box = [count]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def own_rows(config: OfflineJudgeConfig, rows: list[Query]) -> list[Query]:
    """This job's share. Raises ``UserError`` if there are fewer rows than shares."""
    if len(rows) < config.shards:
        raise UserError("shards", f"{config.shards} for {len(rows)} rows", "give at most as many as there are rows")
    return [rows[i] for i in share_of(len(rows), config.shard, config.shards)]


def read_rows(
    config: OfflineJudgeConfig | ProbeConfig, prompt: JudgePrompt | RewardPrompt, may_lack_response: bool = False
) -> list[Query]:
    """Every response of the input with its query, and the queries of rows that ``may_lack_response``.

    Raises ``UserError`` for bad rows, also for responses too long to be judged.
    """
    read = partial(
        read_queries,
        format=config.format,
        polarity=config.polarity,
        fields=config.fields,
        on_bad_row=config.on_bad_row,
        require_rubric=prompt.needs_rubric,
    )
    known = None
    if config.queries:
        known = {q.id: q for q in read(config.queries)}

    def check(query: Query) -> None:
        if query.response is None:
            return
        if prompt.longest(query)[0] + most_tokens(prompt.tokenizer, [query.response]) > prompt.max_length:
            prompt.build_items(query, encode_text(prompt.tokenizer, query.response))

    rows = read([config.input], require_response=True, may_lack_response=may_lack_response, check=check, queries=known)
    unanswered = set(known or ()) - {query.id for query in rows}
    if unanswered:
        warn(f"{len(unanswered)} of {len(known)} queries have no row in {config.input}")
    return rows


def row_key(seed: int, row: Row) -> str:
    """The key of a row's random numbers (sampled verdicts, the placebo), the same at any place in the file."""
    return f"{seed}/{row.query.id}/{row.query.response}"


def judge_rows(stage: JudgeStage, rows: Sequence[Row], seed: int) -> list[tuple[Row, list[JudgeInput], JudgementRow]]:
    """Verdicts of all items, attributions of those judged True with a weight (Algorithm 1), or of all scores (collective)."""
    inputs = stage.inputs([row.query for row in rows], [row.body for row in rows])
    judgements = stage.verdicts(inputs, [row_key(seed, row) for row in rows])
    weights = [kind_of(items).weights(row.query) for row, items in zip(rows, judgements, strict=True)]
    needed = [
        [judgement.verdict is not False and weight != 0 for judgement, weight in zip(items, row_weights, strict=True)]
        for items, row_weights in zip(judgements, weights, strict=True)
    ]
    stage.attribute(inputs, judgements, needed, weights)
    return list(zip(rows, inputs, judgements, strict=True))


def output_record(
    stage: JudgeStage, row: Row, judgements: JudgementRow, alphas: Alphas, format_out: OutputFormat
) -> dict:
    """The output line of one row, as plain data. ``alphas``: of its judgements."""
    query, kind = row.query, kind_of(judgements)
    rewards = kind.token_rewards(query, judgements, alphas, len(row.body))
    record = {
        "id": query.given.id,
        "reward": None,
        "tokens": token_texts(stage.prompt.tokenizer, row.body),
        "token_rewards": plain_numbers(rewards),
    } | kind.output_record(query, judgements, alphas)
    if format_out == "trl":
        record |= fields_for_trl(query, row.body)
    if query.given.choice is not None:
        record["choice"] = query.given.choice
    add_given(record, query.given.fields)
    for item, given in zip(record.get("items", ()), query.given.items):
        add_given(item, given)
    return record


def add_given(record: dict, given: dict) -> None:
    """Keep the fields that the row had. A field with one of our names becomes ``given_NAME``."""
    record |= {f"given_{name}" if name in record else name: value for name, value in given.items()}


def add_inputs(record: dict, inputs: Sequence[JudgeInput], prompt: JudgePrompt | RewardPrompt) -> None:
    """Add to each judgement what the judge read, so that anyone can repeat the gradient with their own autograd."""
    for judged, read in zip(record.get("items", [record]), inputs, strict=True):
        judged |= {
            "input_ids": read.input_ids,
            "response_start": read.response_start,
            "response_end": read.response_end,
        } | prompt.described(read)
