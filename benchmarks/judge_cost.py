"""What dense rewards cost beside the sparse judge calls that others make: time and peak memory, each way in its own process.

    python benchmarks/judge_cost.py --data healthbench.jsonl [--rows 4 --rounds 3 --response-tokens 400]
    python benchmarks/judge_cost.py --prefix-tokens 1500 --ways c gate gate-all contracted-all a-one gate-twice

A random model (hidden 512, 8 layers by default: arithmetic dominates) judges responses to HealthBench conversations with
their own rubrics (without --data, synthetic rows of the same sizes), with the default judge template and a byte-level
tokenizer trained on that text. The ways:

    a      Hugging Face, one padded call an item, full logits, all parameters requiring gradients, one backward an item
    b      Hugging Face, one call an item, no gradients, logits of the last position: the sparse judge
    b-own  the same by this project's engine, every item a sequence of its own
    c      this project, sparse: prefixes shared
    d      this project, dense, judge.credit=per_item: c and a backward for each item judged True
    e      this project, dense, judge.credit=per_response: c and one backward a response for the items judged True
    d-all, e-all  the same where every item is judged True: the most that it can cost
    d-rec, e-rec  d and e with judge.recompute=full
    contracted-all  d-all with judge.attribution=contracted
    gate   this project, judge.attribution=gate over the branches: verdicts and attributions of all items in one pass
    gate-all  the same with judge.gate_queries=all: c and a backward for each item, all judged True
    a-one  a on the first item of each row: the memory that the attribution of one item takes by autograd
    gate-twice  gate on twice as many items (with --prefix-tokens)

What a random model says means nothing: every second item counts as judged True, in the rows named -all every item.
Responses are random text of the given length. The ways take turns, round after round, and the medians are reported; CPU
seconds are the process's own, so that other work on the machine disturbs them least. Peak memory is what the judging adds
to the process (to the allocated GPU memory, on a GPU).
"""

import argparse
import multiprocessing
import os
import random
import tempfile
import time
from pathlib import Path
from statistics import median

import torch
from machine import machine
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from g2r_megatron.config.options import JudgeConfig, Layout, Precision
from g2r_megatron.credit.judgements import backward_passes
from g2r_megatron.data.readers import read_queries
from g2r_megatron.data.tokenizer import encode_text, load_tokenizer
from g2r_megatron.data.types import Query, RubricItem
from g2r_megatron.device import local_device, on_cpu
from g2r_megatron.judge.frozen import FrozenJudge
from g2r_megatron.judge.packing import tree_tokens
from g2r_megatron.judge.prompt import JudgePrompt
from g2r_megatron.judge.stage import JudgeStage
from g2r_megatron.judge.types import JudgeInput
from g2r_megatron.model.build import build_model
from g2r_megatron.model.hf import open_hf_model
from g2r_megatron.parallel import cpu
from g2r_megatron.parallel.groups import build_groups, initialize

WAYS = ("a", "b", "b-own", "c", "d", "e", "d-all", "e-all", "d-rec", "e-rec")
SHAPES_7B = dict(hidden=3584, inner=18944, keys=512, layers=28, vocab=152064)  # Qwen2.5-7B
GATE_WAYS = ("contracted-all", "gate", "gate-all", "a-one", "gate-twice")
WORDS = ["fever", "rash", "doctor", "water", "rest", "pain", "dose", "day", "child", "test", "advice", "sleep", "heart"]


def synthetic_queries(count: int) -> list[Query]:
    """Queries of HealthBench's sizes: 780 characters of conversation, 1 to 26 criteria of 260 characters."""
    numbers = random.Random(1)

    def text(characters: int) -> str:
        return " ".join(numbers.choice(WORDS) for _ in range(characters // 6))

    return [
        Query(
            f"synthetic-{i}",
            ({"role": "user", "content": text(numbers.randrange(200, 1400))},),
            tuple(
                RubricItem(text(260), numbers.choice([-5.0, 3.0, 5.0, 8.0])) for _ in range(numbers.randrange(4, 20))
            ),
        )
        for i in range(count)
    ]


def read_rows(data: str | None, count: int) -> tuple[str, list[Query], str]:
    """(where from, ``count`` queries of evenly spread rubric sizes, text to make tokens and responses of)."""
    queries = read_queries([data], "healthbench", "raw") if data else synthetic_queries(100)
    source = f"{count} of {len(queries)} {'HealthBench' if data else 'synthetic'} rows, evenly spread over rubric sizes"
    text = "\n".join(
        part for q in queries for part in (q.messages[-1]["content"], *(item.criterion for item in q.rubric))
    )
    queries = sorted(queries, key=lambda query: len(query.rubric))
    return source, [queries[(2 * i + 1) * len(queries) // (2 * count)] for i in range(count)], text


def write_model(args: argparse.Namespace, text: str, directory: str) -> None:
    """A random Qwen3 of the given size with a byte-level BPE trained on ``text``."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=args.vocab,
        special_tokens=["<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([text, "True False\n True False\n" * 1000], trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>").save_pretrained(directory)
    config = Qwen3Config(
        vocab_size=args.vocab,
        hidden_size=args.hidden,
        intermediate_size=3 * args.hidden,
        num_hidden_layers=args.layers,
        num_attention_heads=args.hidden // 64,
        num_key_value_heads=max(args.hidden // 128, 1),
        head_dim=64,
        eos_token_id=0,
        bos_token_id=None,
    )
    torch.manual_seed(1)
    Qwen3ForCausalLM(config).save_pretrained(directory)


def judge_config(args: argparse.Namespace) -> JudgeConfig:
    return JudgeConfig(
        chat_template=False,
        target="log_prob",
        attribution=next((name for name in ("gate", "contracted") if args.way.startswith(name)), "grad_x_embed"),
        gate_queries="all" if args.way == "gate-all" else None,
        normalize="softmax",
        standardize=False,
        smoothing="none",
        micro_batch_tokens=args.micro_batch_tokens,
        recompute="full" if args.way.endswith("-rec") else "none",
        credit="per_response" if args.way.startswith("e") else "per_item",
    )


def sized_inputs(args: argparse.Namespace) -> list[list[JudgeInput]]:
    """Rows of ``items`` items of ``item_tokens`` tokens behind ``prefix_tokens`` that end with the response: random ids."""
    numbers = random.Random(3)

    def ids(count: int) -> list[int]:
        return [numbers.randrange(1, args.vocab) for _ in range(count)]

    rows = []
    for _ in range(args.rows):
        prefix, end = ids(args.prefix_tokens), args.prefix_tokens
        last = end + args.item_tokens - 1
        items = [prefix + ids(args.item_tokens) for _ in range(args.items * (2 if args.way == "gate-twice" else 1))]
        rows.append([JudgeInput(item, end - args.response_tokens, end, last) for item in items])
    return rows


class Judged:
    """The judge inputs of the rows, and the two ways to run them."""

    def __init__(self, args: argparse.Namespace, directory: str):
        _, self.queries, text = read_rows(args.data, args.rows)
        tokenizer = load_tokenizer(directory)
        ids = encode_text(tokenizer, text)
        starts = random.Random(2)
        self.bodies = []
        for _ in self.queries:
            start = starts.randrange(len(ids) - args.response_tokens)
            self.bodies.append(ids[start : start + args.response_tokens])
        self.config, self.directory = judge_config(args), directory
        self.prompt = JudgePrompt(tokenizer, self.config)
        if args.prefix_tokens:
            self.inputs = sized_inputs(args)
        else:
            self.inputs = [self.prompt.build_items(q, body) for q, body in zip(self.queries, self.bodies, strict=True)]
        if args.way == "a-one":
            self.inputs = [row[:1] for row in self.inputs]
        self.passes = 0
        self.model = None  # of ways a and b

    def hugging_face(self, way: str):
        """function(rows) for ways a and b."""
        self.model = model = (
            AutoModelForCausalLM.from_pretrained(self.directory, dtype=torch.float32).to(local_device()).eval()
        )

        def naive(rows) -> None:
            for row in rows:
                length = max(len(item.input_ids) for item in row)
                for item in row:
                    padding = length - len(item.input_ids)
                    ids = torch.tensor([item.input_ids + [0] * padding], device=model.device)
                    mask = torch.tensor([[1] * len(item.input_ids) + [0] * padding], device=model.device)
                    leaf = model.get_input_embeddings()(ids).detach().requires_grad_()
                    logits = model(inputs_embeds=leaf, attention_mask=mask, use_cache=False).logits
                    log_probs = logits[0, item.verdict_position].log_softmax(-1)
                    log_probs[self.prompt.true_ids].logsumexp(0).backward()
                    (leaf.grad * leaf.detach()).sum(-1)[0, item.response_start : item.response_end].tolist()
                    self.passes += 1

        @torch.no_grad()
        def sparse(rows) -> None:
            for row in rows:
                for item in row:
                    ids = torch.tensor([item.input_ids], device=model.device)
                    logits = model(ids, use_cache=False, logits_to_keep=1).logits
                    logits[0, -1].log_softmax(-1)[[*self.prompt.true_ids, *self.prompt.false_ids]].tolist()

        return sparse if way == "b" else naive

    def own(self, way: str):
        """function(rows) for the other ways."""
        initialize(seed=1)
        groups, hf = build_groups("judge", Layout()), open_hf_model(self.directory, "judge.model")
        model = build_model("judge", hf, groups, Precision(), self.config.recompute)
        stage = JudgeStage(
            FrozenJudge(model, self.config, self.prompt.true_ids, self.prompt.false_ids), self.prompt, self.config
        )

        def run(rows) -> None:
            if way == "b-own":
                rows = [[item] for row in rows for item in row]
            attributes = way[0] in "de" or way in GATE_WAYS
            judgements = stage.verdicts(rows, [str(i) for i in range(len(rows))], attributes)
            if attributes:
                marks = [
                    [way in GATE_WAYS or way.endswith("-all") or k % 2 == 0 for k in range(len(row))] for row in rows
                ]
                for row, true in zip(judgements, marks, strict=True):
                    for item, verdict in zip(row, true, strict=True):
                        item.verdict = verdict
                stage.attribute(rows, judgements, marks, [[1.0] * len(row) for row in rows])
                self.passes += sum(len(backward_passes(row)) for row in judgements)

        return run


def memory(reset: bool = False) -> int:
    """Peak bytes of this process (of its GPU memory) so far; ``reset`` makes the present size the peak."""
    if not on_cpu():
        if reset:
            torch.cuda.reset_peak_memory_stats()
        return torch.cuda.max_memory_allocated()
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    status = Path("/proc/self/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1]) * 1024


def serve(args: argparse.Namespace, directory: str, connection) -> None:
    """Measure one way in this process whenever asked to."""
    cpu.install()
    judged = Judged(args, directory)
    function = judged.hugging_face(args.way) if args.way in ("a", "b", "a-one") else judged.own(args.way)
    first = judged.inputs[0][0].input_ids
    function([[JudgeInput([*first[:12], 5 + k], 4, 8, 12) for k in range(2)]])  # warm-up
    while connection.recv():
        connection.send(measure(judged, function))


def synchronize() -> None:
    if not on_cpu():
        torch.cuda.synchronize()


def measure(judged: Judged, function) -> dict:
    if judged.model is not None:
        judged.model.zero_grad(set_to_none=True)
    judged.passes = 0
    before = memory(reset=True)
    start, start_cpu = time.perf_counter(), time.process_time()
    function(judged.inputs)
    synchronize()
    return {
        "seconds": time.perf_counter() - start,
        "CPU seconds": time.process_time() - start_cpu,
        "MiB": (memory() - before) / 2**20,
        "backward passes": judged.passes,
        "items": sum(map(len, judged.inputs)),
        "tokens of separate items": sum(len(item.input_ids) for row in judged.inputs for item in row),
        "tokens with shared prefixes": sum(map(tree_tokens, judged.inputs)),
    }


def rounds(args: argparse.Namespace, directory: str):
    """Yields way -> median figures after every round."""
    # malloc gives every tensor back when it is freed: the peak is of what lives, not of fragments
    os.environ["MALLOC_MMAP_THRESHOLD_"] = str(2**16)
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(
        ["g2r_megatron.judge.stage", "transformers.models.qwen3"]
    )  # imported once, for all
    connections, found = {}, {way: [] for way in args.ways}
    for way in args.ways:
        connections[way], there = processes.Pipe()
        own = argparse.Namespace(**vars(args), way=way)
        processes.Process(target=serve, args=(own, directory, there), daemon=True).start()
        there.close()
    for number in range(1, args.rounds + 1):
        for way, connection in connections.items():
            connection.send(True)
            found[way].append(connection.recv())
            print(number, way, found[way][-1], flush=True)
        yield {way: {key: median(r[key] for r in runs) for key in runs[0]} for way, runs in found.items()}
    for connection in connections.values():
        connection.send(False)


def table(results: dict[str, dict]) -> str:
    """Times and memory of each way, and beside the ways a, b and c where they were run."""
    clock = "CPU seconds" if on_cpu() else "seconds"
    beside = [(key, name) for name, key in (("a", clock), ("a", "MiB"), ("b", clock), ("c", clock)) if name in results]
    heads = ["way", "s", "CPU s", "MiB", "backward passes", *(f"{key} / {name}" for key, name in beside)]
    rows = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for way, r in results.items():
        ratios = [r[key] / results[name][key] for key, name in beside]
        figures = [f"{r['seconds']:.1f}", f"{r['CPU seconds']:.1f}", f"{r['MiB']:.0f}", f"{r['backward passes']:.0f}"]
        rows.append("| " + " | ".join([way, *figures, *(f"{ratio:.2f}" for ratio in ratios)]) + " |")
    return "\n".join(rows)


def targets(args: argparse.Namespace, results: dict[str, dict]) -> str:
    """The goals whose ways were run, with what was found."""
    clock = "CPU seconds" if on_cpu() else "seconds"
    gate_goal = 1.6 if args.prefix_tokens < 3000 else 1.4
    floor = f" (FLOP floor {gate_flops(args) / sparse_flops(args):.2f})" if args.prefix_tokens else ""
    goals = [
        ("d at most half of a's time", "d", "a", clock, 0.5),
        ("d at most a third of a's memory", "d", "a", "MiB", 1 / 3),
        ("e below b in time", "e", "b", clock, 1.0),
        ("with every item judged True: d at most half of a's time", "d-all", "a", clock, 0.5),
        ("with every item judged True: e below b", "e-all", "b", clock, 1.0),
        (f"gate beside c, every item attributed{floor}", "gate", "c", clock, gate_goal),
        ("gate-all beside contracted-all", "gate-all", "contracted-all", clock, 0.6),
        ("gate's memory beside autograd of one item", "gate", "a-one", "MiB", 0.2),
        ("gate's memory with twice as many items", "gate-twice", "gate", "MiB", 1.1),
    ]
    lines = []
    for name, way, beside, key, goal in goals:
        if way in results and beside in results:
            found = results[way][key] / results[beside][key]
            lines.append(f"- {name}: {found:.2f}, {'met' if found <= goal else 'missed'} ({goal:.2g})")
    if args.prefix_tokens:
        lines.append(counted_at_7b(args))
    return "\n".join(lines)


def _sizes(args: argparse.Namespace) -> tuple[float, float, float, float]:
    """FLOPs of a token's products in one layer, of its MLP alone, of one query-key pair in one layer, of one verdict's logits."""
    h, q, k = args.hidden, args.hidden, 64 * max(args.hidden // 128, 1)
    k, inner = getattr(args, "keys", k), getattr(args, "inner", 3 * h)
    mlp = 2 * 3 * h * inner
    return 2 * h * (2 * q + 2 * k) + mlp, mlp, 4 * q, 2 * h * args.vocab


def _branch_pairs(args: argparse.Namespace) -> float:
    return args.items * args.item_tokens * (args.prefix_tokens + args.item_tokens / 2)


def sparse_flops(args: argparse.Namespace) -> float:
    """Of one row's verdicts, prefix once."""
    token, _, pair, logits = _sizes(args)
    tokens = args.prefix_tokens + args.items * args.item_tokens
    return (
        args.layers * (tokens * token + pair * (args.prefix_tokens**2 / 2 + _branch_pairs(args))) + args.items * logits
    )


def gate_flops(args: argparse.Namespace) -> float:
    """Of verdicts and gates: the prefix without the last layer's attention and MLP, branches forward and backward.

    The backward computes the scores again, and of prefix keys only what they do to the queries: 3 products for 2.
    """
    token, mlp, pair, logits = _sizes(args)
    pairs = (args.layers - 1) * args.prefix_tokens**2 / 2
    prefix = args.prefix_tokens * (args.layers * token - mlp) + pair * pairs
    branches = args.items * args.item_tokens * token * 2 + pair * 2.5 * _branch_pairs(args)
    return prefix + args.layers * branches + 2 * args.items * logits


def counted_at_7b(args: argparse.Namespace) -> str:
    """FLOPs of gate beside those of c, counted, for a judge of 7B and the same items."""
    found = []
    for prefix, goal in ((1500, 1.4), (5000, 1.2)):
        large = argparse.Namespace(**{**vars(args), **SHAPES_7B, "prefix_tokens": prefix})
        ratio = gate_flops(large) / sparse_flops(large)
        found.append(f"{ratio:.2f} with a prefix of {prefix}, {'met' if ratio <= goal else 'missed'} ({goal})")
    return "- counted FLOPs of gate beside c at 7B shapes: " + "; ".join(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sizes = dict(rows=4, rounds=3, response_tokens=400, hidden=512, layers=8, vocab=8192, micro_batch_tokens=1)
    for name, default in sizes.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=default)
    parser.add_argument(
        "--prefix-tokens", type=int, default=0, help="rows of random ids with a prefix of so many tokens"
    )
    parser.add_argument("--items", type=int, default=11, help="of such a row")
    parser.add_argument("--item-tokens", type=int, default=60, help="of each of them")
    parser.add_argument("--ways", nargs="+", choices=WAYS + GATE_WAYS, default=WAYS)
    parser.add_argument("--data", help="HealthBench rows (jsonl or parquet); default: synthetic ones")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"))
    args = parser.parse_args()
    source, _, text = read_rows(args.data, args.rows)
    args.output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as directory:
        write_model(args, text, directory)
        for number, results in enumerate(rounds(args, directory), 1):
            report = markdown(args, source, number, {name: getattr(args, name) for name in sizes}, results)
            name = f"judge_cost_gates_{args.prefix_tokens}.md" if args.prefix_tokens else "judge_cost.md"
            (args.output / name).write_text(report)
    print(report)


def markdown(args: argparse.Namespace, source: str, done: int, sizes: dict, results: dict[str, dict]) -> str:
    first = next(iter(results.values()))
    counts = {key: first[key] for key in ("items", "tokens of separate items", "tokens with shared prefixes")}
    if args.prefix_tokens:
        sizes = sizes | dict(prefix_tokens=args.prefix_tokens, items=args.items, item_tokens=args.item_tokens)
        source = f"{args.rows} rows of random ids"
    given = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in sizes.items())
    return "\n".join(
        [
            "# What judging costs",
            "",
            f"`python benchmarks/judge_cost.py {'--data FILE ' if args.data else ''}{given}"
            + ("`" if args.ways == WAYS else f" --ways {' '.join(args.ways)}`"),
            "",
            f"{source}: " + ", ".join(f"{value:.0f} {key}" for key, value in counts.items()) + ".",
            f"Medians of {done} rounds in which the ways take turns. {machine()}",
            "",
            (__doc__ or "").split("The ways:\n\n")[1].split("\n\nWhat a random")[0],
            "",
            table(results),
            "",
            targets(args, results),
            "",
        ]
    )


if __name__ == "__main__":
    main()
