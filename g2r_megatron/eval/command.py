"""``g2r eval``: is this model better? Rows in, scored responses, a table and a page out (docs/eval.md)."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from g2r_megatron.config.command_options import EvalConfig
from g2r_megatron.credit.hazards import answer_mass_warning
from g2r_megatron.data.chat_template import with_system_prompt
from g2r_megatron.data.readers import read_queries
from g2r_megatron.data.tokenizer import encode_text
from g2r_megatron.data.types import Query
from g2r_megatron.errors import UserError, warn
from g2r_megatron.eval.ledger import LedgerFile
from g2r_megatron.eval.records import (
    Answer,
    data_key,
    judge_facts,
    record_of,
    verified_record,
    write_results,
)
from g2r_megatron.eval.sampling import newest_weights, run_options, sampled
from g2r_megatron.eval.table import summary_table
from g2r_megatron.judge.output_file import job_key
from g2r_megatron.parallel import groups
from g2r_megatron.records.evaluations import PAGE, RESPONSES
from g2r_megatron.records.progress_bar import CountProgress
from g2r_megatron.rollout.vllm.check_servers import check_servers
from g2r_megatron.verify.verifier import Verifier
from g2r_megatron.workers import (
    PolicyInputs,
    VerdictJudge,
    judge_texts,
    read_policy,
    read_verdict_judge,
    verified_by_all,
    verifier_for,
)

FREE = ("data", "responses", "output", "batch_rows")  # the rows count, not their paths


@dataclass(frozen=True)
class Task:
    """A response to score: number ``sample`` (from 0) to ``query``, which holds it if it comes from a file."""

    query: Query
    sample: int


def evaluate_model(config: EvalConfig) -> None:
    """Sample and judge the responses that are not done yet, and write the results (collective; rank 0 writes and prints).

    ``config`` has passed ``check_eval_config``. Raises ``UserError`` for bad rows, models or layouts before the weights are
    read.
    """
    if config.policy.model:
        warn_of_own_judge(config)
        config = replace(config, policy=replace(config.policy, model=newest_weights(config.policy.model)))
    judge = read_verdict_judge(config.judge, "judge") if config.judge.model else None
    policy = None
    if config.policy.model:
        policy = read_policy(config.policy, config.rollout, config.system_prompt, "system_prompt")
    queries = read_rows(config)
    if judge is None and any(query.answer is None for query in queries):
        raise UserError("judge.model", "missing", "give the Hugging Face directory of the judge: rows have rubrics")
    verifier = verifier_for(config.verifier, queries)
    tasks = tasks_of(queries, config.samples if policy else 1)
    check_lengths(config, judge, policy, queries)
    if policy is not None:
        check_servers(policy.policy, config.rollout, config.policy.precision.dtype)
    groups.initialize(config.seed)
    file = LedgerFile(Path(config.output), job_key(config, queries, FREE))
    if policy is not None:
        sample_missing(config, policy, tasks, file)
    else:
        file.ledger.answers |= {place: answer_of(task, judge) for place, task in enumerate(tasks)}
    if judge is not None:
        judge_missing(config, judge, tasks, file)
    if verifier is not None:
        verify_missing(config, verifier, tasks, file)
    if file.is_writer:
        finish(config, tasks, file)


def warn_of_own_judge(config: EvalConfig) -> None:
    """Say so if the judge is the one that trained the policy."""
    options = run_options(config.policy.model) or {}
    trained_by = options and (options["judge"]["model"] or options["policy"]["model"])
    if trained_by and config.judge.model and os.path.realpath(config.judge.model) == os.path.realpath(trained_by):
        run = config.policy.model
        warn(f"judge.model {config.judge.model} has trained {run}: what exploits it scores well; give another judge")


def read_rows(config: EvalConfig) -> list[Query]:
    """The rows to evaluate on, or the responses of ``config.responses``. Raises ``UserError`` for bad ones."""

    def read(paths: list[str], **options) -> list[Query]:
        found = read_queries(
            *(paths, config.format, config.polarity),
            fields=config.fields,
            on_bad_row=config.on_bad_row,
            criterion=config.verifier.criterion,
            **options,
        )
        return [replace(q, messages=with_system_prompt(q.messages, config.system_prompt)) for q in found]

    queries = read(config.data) if config.data else None
    if not config.responses:
        return queries or []
    known = None if queries is None else {query.id: query for query in queries}
    rows = read(config.responses, require_response=True, queries=known)
    if unanswered := set(known or ()) - {query.id for query in rows}:
        warn(f"{len(unanswered)} of {len(known or ())} rows of data have no response and are left out")
    return rows


def tasks_of(queries: Sequence[Query], samples: int) -> list[Task]:
    """``samples`` of every query; responses from a file are numbered as they come."""
    tasks: list[Task] = []
    count: dict[str, int] = {}
    for query in queries:
        first = count.get(query.id, 0)
        count[query.id] = first + samples
        tasks += [Task(query, first + j) for j in range(samples)]
    return tasks


def check_lengths(
    config: EvalConfig, judge: VerdictJudge | None, policy: PolicyInputs | None, queries: Sequence[Query]
) -> None:
    """Raise ``UserError`` for a prompt or a judge input that is too long; fill the policy's prompts."""
    for query in queries if policy is not None else ():
        policy.prompt_ids.check(query)
    if policy is not None:
        policy.prompt_ids.add(queries)
    for query in queries if judge is not None else ():
        if query.answer is None:
            given = None if query.response is None else len(encode_text(judge.prompt.tokenizer, query.response))
            judge.check([query], config.rollout.max_response_tokens if given is None else given)


def answer_of(task: Task, judge: VerdictJudge | None) -> Answer:
    """The response of a file. A file that ``g2r eval`` wrote knows its length and end; else the judge's tokens count."""
    text, given = task.query.response or "", task.query.given
    fields = given.fields if given else {}
    if type(fields.get("length")) is int and type(fields.get("finished")) is bool:
        return Answer(text, fields["length"], fields["finished"])
    return Answer(text, None if judge is None else len(encode_text(judge.prompt.tokenizer, text)), None)


def sample_missing(config: EvalConfig, policy: PolicyInputs, tasks: Sequence[Task], file: LedgerFile) -> None:
    """Sample the responses that are not there yet (collective)."""
    todo = [place for place in range(len(tasks)) if place not in file.ledger.answers]
    asked = [(tasks[p].query, f"{config.seed}/eval/{tasks[p].query.id}/{tasks[p].sample}") for p in todo]
    temperature, done = 0.0 if config.greedy else None, len(tasks) - len(todo)
    with CountProgress("sampled", "responses", len(tasks), done, enabled=file.is_writer and bool(todo)) as progress:
        for places, found in sampled(config.policy, config.rollout, policy, asked, temperature):
            file.sampled([todo[i] for i in places], [Answer(r.text, len(r.token_ids), r.answered) for r in found])
            done += len(places)
            progress.done(done)


def judge_missing(config: EvalConfig, judge: VerdictJudge, tasks: Sequence[Task], file: LedgerFile) -> None:
    """Judge the responses to rubrics that are not judged yet (collective)."""
    rubrics = [place for place, task in enumerate(tasks) if task.query.answer is None]
    todo = [place for place in rubrics if place not in file.ledger.verdicts]
    if not todo:
        return
    stage, before = judge.load(), len(rubrics) - len(todo)
    with CountProgress("judged", "responses", len(rubrics), before, enabled=file.is_writer) as progress:
        for first in range(0, len(todo), config.batch_rows):
            places = todo[first : first + config.batch_rows]
            texts = [file.ledger.answers[place].text for place in places]
            file.judged(places, judge_texts(stage, [tasks[place].query for place in places], texts))
            progress.done(before + first + len(places))


def verify_missing(config: EvalConfig, verifier: Verifier, tasks: Sequence[Task], file: LedgerFile) -> None:
    """Verify the answers that are not verified yet (collective)."""
    answers = [place for place, task in enumerate(tasks) if task.query.answer is not None]
    todo = [place for place in answers if place not in file.ledger.right]
    before = len(answers) - len(todo)
    with CountProgress("verified", "answers", len(answers), before, enabled=file.is_writer and bool(todo)) as progress:
        for first in range(0, len(todo), config.batch_rows):
            places = todo[first : first + config.batch_rows]
            texts = [file.ledger.answers[place].text for place in places]
            found = verified_by_all(verifier, [tasks[place].query for place in places], texts)
            file.verified(places, [verdict is True for verdict in found])
            progress.done(before + first + len(places))
    verifier.close()


def finish(config: EvalConfig, tasks: Sequence[Task], file: LedgerFile) -> None:
    """Write the results, and print the table (rank 0)."""
    ledger, output = file.ledger, Path(config.output)
    records = []
    for place, task in enumerate(tasks):
        asked = (task.query, task.sample, ledger.answers[place])
        if task.query.answer is None:
            records.append(record_of(*asked, ledger.judgements(place)))
        else:
            records.append(verified_record(*asked, ledger.right[place]))
    facts = {
        "policy": config.policy.model or ", ".join(config.responses),
        "judge": judge_facts(config.judge),
        "data": data_key([task.query for task in tasks]),
    }
    found = write_results(output, facts, records, config.seed)
    print(summary_table(found))
    print(f"\neval: {output / PAGE}, {output / RESPONSES}", flush=True)
    if found["items"] and (warning := answer_mass_warning(found["answer_mass"])):
        warn(warning)
