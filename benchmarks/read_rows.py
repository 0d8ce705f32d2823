"""Time and memory to read, render and check rows of HealthBench's size, as every process of a run does before it begins.

    python benchmarks/read_rows.py [--rows 100000 --suffix .jsonl.gz --tokenizer DIR]

The rows are made here: 3 messages of 260 characters, 12 criteria of 260 characters with weights and tags, every text
different, a tenth of them with characters outside ASCII. Without ``--tokenizer`` (a Hugging Face directory) a byte-level
tokenizer with a ChatML template is made. Each number of rows is read in a process of its own; the time is that of
``read_queries`` with the checks of training (the CPU's seconds do not depend on what else runs), the peak memory that of
the process, imports included.
"""

import argparse
import gzip
import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from machine import machine

FEW = 10
CHATML = (
    "{%- for message in messages %}{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}"
    "{%- endfor %}{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{%- endif %}"
)
WORDS = ["patient", "should", "the", "fever", "doctor", "advice", "clear", "symptoms", "for", "days", "risk", "dose"]
OTHER = ["naïve", "39 °C", "“yes”", "発熱", "température"]


def text(rng: random.Random, characters: int) -> str:
    """About so many characters of words; no two texts are equal."""
    words = rng.choices(WORDS, k=characters // 7)
    if rng.random() < 0.1:
        words[0] = rng.choice(OTHER)
    return f"{rng.randrange(10**9)} {' '.join(words)}"


def make_row(number: int) -> dict:
    """A row in HealthBench's format."""
    rng = random.Random(number)
    roles = ("user", "assistant", "user")
    items = [
        {"criterion": text(rng, 260), "points": rng.choice([-5, 3, 5, 8]), "tags": ["level:example", "axis:accuracy"]}
        for _ in range(11)
    ]
    items.append({"criterion": text(rng, 260), "points": 10, "tags": ["level:cluster"]})
    return {
        "prompt": [{"role": role, "content": text(rng, 260)} for role in roles],
        "prompt_id": f"row-{number}",
        "rubrics": items,
    }


def write_rows(path: Path, rows: int) -> None:
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "wt", encoding="utf-8") as file:
        for number in range(rows):
            file.write(json.dumps(make_row(number), ensure_ascii=False) + "\n")


def make_tokenizer(directory: Path) -> None:
    """A byte-level BPE tokenizer with a ChatML template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=specials, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator([" ".join(WORDS) + " True False True False"] * 10, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    fast.chat_template = CHATML
    fast.save_pretrained(directory)


def measure(rows: Path, tokenizer_directory: Path) -> None:
    """Read the rows as training does; print rows, seconds and peak memory as JSON."""
    from g2r_megatron.config.options import JudgeConfig, RolloutConfig
    from g2r_megatron.data.prompts import Prompts
    from g2r_megatron.data.readers import read_queries
    from g2r_megatron.data.tokenizer import load_tokenizer
    from g2r_megatron.judge.prompt import JudgePrompt

    tokenizer, rollout = load_tokenizer(tokenizer_directory), RolloutConfig()
    prompts = Prompts(tokenizer, rollout.chat_template, rollout.max_prompt_tokens)
    judge = JudgePrompt(tokenizer, JudgeConfig())

    def check(query) -> None:
        prompts.check(query)
        judge.check_query(query, rollout.max_response_tokens)

    start, start_cpu = time.perf_counter(), time.process_time()
    queries = read_queries([str(rows)], "auto", None, check=check)
    prompts.add(queries)
    seconds, cpu = time.perf_counter() - start, time.process_time() - start_cpu
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"rows": len(queries), "seconds": seconds, "cpu_seconds": cpu, "peak_bytes": peak}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--suffix", default=".jsonl", help=".jsonl or .jsonl.gz")
    parser.add_argument("--tokenizer", type=Path, help="Hugging Face directory with a chat template")
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)  # in a process of its own
    arguments = parser.parse_args()
    if arguments.measure:
        measure(arguments.measure, arguments.tokenizer)
        return
    with tempfile.TemporaryDirectory() as directory:
        tokenizer = arguments.tokenizer
        if tokenizer is None:
            tokenizer = Path(directory) / "tokenizer"
            make_tokenizer(tokenizer)
        results = []
        for count in (FEW, arguments.rows):
            path = Path(directory) / f"{count}{arguments.suffix}"
            write_rows(path, count)
            command = [sys.executable, __file__, "--measure", str(path), "--tokenizer", str(tokenizer)]
            results.append(json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout))
            path.unlink()
    print(machine())
    for result in results:
        times = f"{result['seconds']:.1f} s ({result['cpu_seconds']:.1f} s of CPU)"
        print(f"{result['rows']} rows: {times}, peak memory {result['peak_bytes'] / 1e9:.2f} GB")
    few, many = results
    for kind in ("seconds", "cpu_seconds"):
        print(f"{kind}: {many[kind] - few[kind]:.2f} more for {arguments.rows} rows than for {FEW}")


if __name__ == "__main__":
    main()
