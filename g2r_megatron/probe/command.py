"""``g2r probe``: is this judge's credit true? Rows in, probe.json, probe.html and a table out (docs/probe.md)."""

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import torch.distributed as dist

from g2r_megatron.config.command_options import ProbeConfig
from g2r_megatron.credit.faithfulness import FEWEST_SENTENCES
from g2r_megatron.data.tokenizer import token_texts
from g2r_megatron.data.types import Query
from g2r_megatron.errors import UserError, warn
from g2r_megatron.eval.sampling import newest_weights, sampled
from g2r_megatron.judge.length_bound import check_judge_positions
from g2r_megatron.judge.offline import read_rows
from g2r_megatron.judge.output_file import job_key
from g2r_megatron.judge.prompt import JudgePrompt
from g2r_megatron.judge.reward_prompt import RewardPrompt, judge_prompt
from g2r_megatron.model.build import build_model
from g2r_megatron.model.hf import load_model_tokenizer, open_hf_model
from g2r_megatron.parallel import groups
from g2r_megatron.parallel.agreement import raised_by_all
from g2r_megatron.probe.ledger import Ledger, LedgerFile
from g2r_megatron.probe.measure import Prober
from g2r_megatron.probe.page import probe_page
from g2r_megatron.probe.pairs import Response, choose, eligible, rows_with
from g2r_megatron.probe.statistics import summary
from g2r_megatron.probe.table import summary_table
from g2r_megatron.records.files import replace_text
from g2r_megatron.records.progress_bar import CountProgress
from g2r_megatron.rollout.vllm.check_servers import check_servers
from g2r_megatron.workers import PolicyInputs, read_policy

FREE = ("input", "queries", "output", "sample", "false_sample")  # what may differ between two attempts at one directory
ROWS_AT_ONCE = 4


def probe_judge(config: ProbeConfig) -> None:
    """Measure the judge's credit on a sample of the input's pairs (collective; rank 0 writes and prints).

    ``config`` has passed ``check_probe_config`` and is filled from a preset. Raises ``UserError`` for bad rows, models or
    layouts before the weights are read, and where there are too few pairs.
    """
    if config.policy.model:
        config = replace(config, policy=replace(config.policy, model=newest_weights(config.policy.model)))
    hf = open_hf_model(config.judge.model, "judge.model")
    prompt = judge_prompt(hf, load_model_tokenizer(hf), config.judge)
    if isinstance(prompt, RewardPrompt):
        check_reward_model(config, prompt)
    queries = read_rows(config, prompt, may_lack_response=True)
    policy = read_asked_policy(config, prompt, queries)
    most = config.rollout.max_response_tokens
    lengths = ((q, most if q.response is None else len(q.response.encode())) for q in queries)
    check_judge_positions(hf, config.judge, lengths)
    if policy is None:
        responses_of(config, prompt, queries)  # raises before any file is made
    groups.initialize(config.seed)
    file, ledger = _opened(config, job_key(config, queries, FREE))
    if policy is not None:
        queries = answered(config, policy, queries, ledger, file)
    responses = responses_of(config, prompt, queries)
    layout = groups.build_groups("judge", config.judge.layout)
    model = build_model("judge", hf, layout, config.judge.precision, config.judge.recompute, config.judge.spec)
    prober = Prober(model, prompt, config)
    judged: list[Response] = []  # of a reward model there are no verdicts
    if isinstance(prompt, RewardPrompt):
        chosen = choose_scored(config, responses)
    else:
        judged = judge_rows(config, prober, responses, ledger, file)
        chosen = choose_pairs(config, judged, ledger)
    measure_pairs(prober, chosen, ledger, file, layout.dp_size)
    if file is not None:
        write_results(config, prompt, judged, chosen, ledger)


def check_reward_model(config: ProbeConfig, prompt: RewardPrompt) -> None:
    """Raise ``UserError`` for what cannot be measured of a reward model."""
    if config.false_sample:
        raise UserError(
            "false_sample", f"{config.false_sample}, but a reward model has no verdicts", "leave it out: sample counts"
        )
    if not prompt.reads_behind_response:
        raise UserError(
            "judge.model",
            "a reward model that reads its score at the response's last token: the sentence there cannot be hidden from it",
            "give one whose chat template ends an answer with a token of its own",
        )


def read_asked_policy(
    config: ProbeConfig, prompt: JudgePrompt | RewardPrompt, queries: Sequence[Query]
) -> PolicyInputs | None:
    """The policy, with the prompts that it must answer; None if all rows have a response. Raises ``UserError``."""
    asked = [query for query in queries if query.response is None]
    if not asked:
        if config.policy.model:
            warn(f"policy.model: {config.policy.model} has no effect: every row has a response")
        return None
    if not config.policy.model:
        found = f"missing, and {len(asked)} of {len(queries)} rows have no response (the first: {asked[0].id!r})"
        raise UserError("policy.model", found, "give the model that answers them, or rows with responses")
    policy = read_policy(config.policy, config.rollout, "", "system_prompt")
    for query in asked:
        policy.prompt_ids.check(query)
        prompt.check_query(query, config.rollout.max_response_tokens)
    policy.prompt_ids.add(asked)
    check_servers(policy.policy, config.rollout, config.policy.precision.dtype)
    return policy


def answered(
    config: ProbeConfig, policy: PolicyInputs, queries: Sequence[Query], ledger: Ledger, file: LedgerFile | None
) -> list[Query]:
    """``queries``, each with a response: its own, or one that is sampled now or was before (collective)."""
    rows = [row for row, query in enumerate(queries) if query.response is None]
    todo = [row for row in rows if row not in ledger.responses]
    asked = [(queries[row], f"{config.seed}/probe/{queries[row].id}") for row in todo]
    done = len(rows) - len(todo)
    with CountProgress("sampled", "responses", len(rows), done, enabled=file is not None and bool(todo)) as progress:
        for places, found in sampled(config.policy, config.rollout, policy, asked):
            new = {todo[place]: response.text for place, response in zip(places, found, strict=True)}
            ledger.responses |= new
            if file is not None:
                file.responses(new)
            done += len(new)
            progress.done(done)
    return [replace(query, response=ledger.responses.get(row, query.response)) for row, query in enumerate(queries)]


def responses_of(config: ProbeConfig, prompt: JudgePrompt | RewardPrompt, queries: Sequence[Query]) -> list[Response]:
    """The responses that have sentences enough to be measured. Raises ``UserError`` if there is none."""
    if responses := eligible(queries, prompt, config.seed):
        return responses
    raise UserError(
        "input",
        f"none of {len(queries)} responses has {FEWEST_SENTENCES} sentences or more",
        "give longer responses: sentences are what is measured",
    )


def _opened(config: ProbeConfig, key: str) -> tuple[LedgerFile | None, Ledger]:
    """(the file, on rank 0; what is measured already, on every rank)."""
    file = None
    with raised_by_all():
        if dist.get_rank() == 0:
            file = LedgerFile(Path(config.output), key)
    box = [file.ledger if file is not None else None]
    dist.broadcast_object_list(box, src=0)
    return file, box[0]


def judge_rows(
    config: ProbeConfig, prober: Prober, responses: Sequence[Response], ledger: Ledger, file: LedgerFile | None
) -> list[Response]:
    """Judge rows until enough of them have a verdict True, and enough a verdict False. Returns the judged rows, in order."""

    def enough(judged: Sequence[Response]) -> bool:
        found = [ledger.rows[response.row] for response in judged]
        return rows_with(found, True) >= config.sample and rows_with(found, False) >= config.false_sample

    count = 0
    with CountProgress("judged", "rows at most", len(responses), 0, enabled=file is not None) as progress:
        while count < len(responses) and not enough(responses[:count]):
            batch = responses[count : count + ROWS_AT_ONCE]
            count += len(batch)
            new = [response for response in batch if response.row not in ledger.rows]
            if not new:
                continue
            found = {response.row: verdicts for response, verdicts in zip(new, prober.verdicts(new), strict=True)}
            ledger.rows |= found
            if file is not None:
                file.rows(found)
            progress.done(count)
    return list(responses[:count])


def choose_pairs(config: ProbeConfig, judged: Sequence[Response], ledger: Ledger) -> list[tuple[Response, int]]:
    """The pairs to measure. Raises ``UserError`` without pairs judged True; warns of fewer than were asked for."""
    verdicts = [ledger.rows[response.row] for response in judged]
    chosen = []
    for wanted, count in ((True, config.sample), (False, config.false_sample)):
        found = choose(judged, verdicts, wanted, count, config.seed)
        if wanted and len({place for place, _ in found}) < 2:
            raise UserError(
                "input",
                f"{len(found)} verdicts True on {len({place for place, _ in found})} responses of {FEWEST_SENTENCES} or more "
                f"sentences, in {len(judged)} judged",
                "give more rows, or a judge or a judge.template that says True: at least 2 responses are needed",
            )
        if len(found) < count and dist.get_rank() == 0:
            warn(f"{len(found)} pairs judged {wanted}, {count} asked for: there are no more in the input")
        chosen += [(judged[place], item) for place, item in found]
    return chosen


def choose_scored(config: ProbeConfig, responses: Sequence[Response]) -> list[tuple[Response, int]]:
    """The responses to measure with a reward model, each with its only judgement. Raises ``UserError`` for less than 2."""
    if len(responses) < 2:
        raise UserError(
            "input", f"{len(responses)} response of {FEWEST_SENTENCES} or more sentences", "give at least 2"
        )
    if len(responses) < config.sample and dist.get_rank() == 0:
        warn(f"{len(responses)} responses, {config.sample} asked for: there are no more in the input")
    return [(response, 0) for response in responses[: config.sample]]


def measure_pairs(
    prober: Prober, chosen: Sequence[tuple[Response, int]], ledger: Ledger, file: LedgerFile | None, replicas: int
) -> None:
    """Measure the pairs that are not measured yet, as many at once as there are replicas of the judge."""
    todo = [(response, item) for response, item in chosen if (response.row, item) not in ledger.pairs]
    before = len(chosen) - len(todo)
    with CountProgress("measured", "pairs", len(chosen), before, enabled=file is not None) as progress:
        for first in range(0, len(todo), replicas):
            batch = todo[first : first + replicas]
            found = prober.measure([response for response, _ in batch], [item for _, item in batch])
            ledger.pairs |= {(pair.row, pair.item): pair for pair in found}
            if file is not None:
                file.pairs(found)
            progress.done(before + first + len(batch))


def write_results(
    config: ProbeConfig,
    prompt: JudgePrompt | RewardPrompt,
    judged: Sequence[Response],
    chosen: Sequence[tuple[Response, int]],
    ledger: Ledger,
) -> None:
    """probe.json, probe.html, and the table on stdout."""
    pairs = [ledger.pairs[response.row, item] for response, item in chosen]
    verdicts = [ledger.rows[response.row] for response in judged]
    found = {"judge_model": config.judge.model, **summary(pairs, verdicts, config.attributions, config.seed)}
    described = []
    for (response, item), pair in zip(chosen, pairs, strict=True):
        query = response.query
        criterion = "the reward" if pair.verdict is None else query.rubric[item].criterion
        texts = {"id": query.given.id if query.given else query.id, "criterion": criterion}
        tokens = token_texts(prompt.tokenizer, response.body)
        described.append(texts | {"tokens": tokens, "sentences": response.spans} | asdict(pair))
    output = Path(config.output)
    replace_text(output / "probe.json", json.dumps({**found, "pairs": described}, indent=1) + "\n")
    replace_text(output / "probe.html", probe_page(found, described))
    print(summary_table(found))
    print(f"\n{found['line']}\nprobe: {output / 'probe.html'}, {output / 'probe.json'}", flush=True)
