"""Rows against the limits of a run: the bound of tokens by bytes holds, what does not fit is named, prompts are made late.

Leaves out which conversations a template rejects (test_prompt.py) and the time for many rows (benchmarks/read_rows.py
measures it; here it runs with a few).
"""

import random
import subprocess
import sys
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from g2r_megatron.config.options import JudgeConfig
from g2r_megatron.data.prompts import Prompts
from g2r_megatron.data.token_bound import most_tokens
from g2r_megatron.data.tokenizer import encode_text, render_prompt
from g2r_megatron.data.types import Query, RubricItem
from g2r_megatron.errors import UserError
from g2r_megatron.judge.prompt import JudgePrompt
from scripts import load
from tiny_models import build_tokenizer

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "read_rows.py"
# grows most in normal forms: 1 to 3 characters (NFC), 1 to 18 characters (NFKC)
TEXTS = [
    "",
    "a",
    "  fever\n\n and <|im_end|> rash ",
    "naïve “39 °C” 発熱 🤒",
    "\u0344\ufb2c" * 9,
    "\ufdfa" * 9,
    "\x00\x7f\u2028",
]


def byte_level(normalizer=None) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        ["fever and rash"], trainers.BpeTrainer(vocab_size=260, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def byte_fallback(*steps, metaspace: bool) -> PreTrainedTokenizerFast:
    """Every byte is a token of its own, also the three of a blank's stand-in."""
    vocabulary = {f"<0x{i:02X}>": i for i in range(256)} | {"<unk>": 256}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    if steps:
        tokenizer.normalizer = normalizers.Sequence(list(steps))
    if metaspace:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


TOKENIZERS = {
    "tiny": build_tokenizer,
    "byte level": byte_level,
    "NFC": lambda: byte_level(normalizers.NFC()),
    "NFKC, lower case": lambda: byte_level(normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])),
    "blanks replaced": lambda: byte_fallback(normalizers.Prepend("▁"), normalizers.Replace(" ", "▁"), metaspace=False),
    "metaspace": lambda: byte_fallback(metaspace=True),
}


@pytest.mark.parametrize("name", TOKENIZERS)
def test_no_text_has_more_tokens_than_its_bound(name):
    """On texts that grow most, and on random ones of any characters."""
    tokenizer, rng = TOKENIZERS[name](), random.Random(name)
    points = [
        range(0x20, 0x7F),
        range(0xA0, 0x500),
        range(0x1F00, 0x2100),
        range(0xFB00, 0xFDFF),
        range(0x1F300, 0x1F600),
    ]
    texts = TEXTS + ["".join(chr(rng.choice(rng.choice(points))) for _ in range(50)) for _ in range(100)]
    for text in texts:
        assert len(encode_text(tokenizer, text)) <= most_tokens(tokenizer, [text])
    joined = sum(len(encode_text(tokenizer, text)) for text in texts)
    assert len(encode_text(tokenizer, "".join(texts))) <= joined + 1000 <= most_tokens(tokenizer, texts) + 1000


def test_a_plain_text_is_not_bounded_higher_than_its_bytes():
    """The bound is worth having: ASCII and composed text of n bytes stays at about n, whatever the normal form."""
    for name in ("byte level", "NFC", "tiny"):
        assert most_tokens(TOKENIZERS[name](), ["fever, “39 °C”, naïve " * 100]) < 2900


def test_an_unknown_normalizer_has_no_bound():
    assert most_tokens(byte_level(normalizers.Nmt()), ["a"]) == float("inf")


def query(content: str, *criteria: str) -> Query:
    return Query("q", ({"role": "user", "content": content},), tuple(RubricItem(c, 1.0) for c in criteria))


@pytest.mark.parametrize("chat_template", [True, False])
def test_prompts(chat_template):
    """A prompt of exactly the limit passes, one token more is named with its length; ids are ``render_prompt``'s."""
    tokenizer, asked = build_tokenizer(), query("A note on fever and rash: rest, drink water. " * 20)
    ids = render_prompt(tokenizer, asked.messages, chat_template, "q")
    prompts = Prompts(tokenizer, chat_template, len(ids))
    prompts.check(asked)
    prompts.add([asked])
    assert prompts["q"] == ids and prompts["q"] is prompts["q"]
    with pytest.raises(
        UserError, match=f"rollout.max_prompt_tokens: query 'q' has {len(ids)} prompt tokens, more than"
    ):
        Prompts(tokenizer, chat_template, len(ids) - 1).check(asked)


@pytest.mark.parametrize("credit", ["per_item", "per_response"])
def test_judge_inputs(credit):
    """The longest input of a row with a response of the given length, to the token, is measured before the run."""
    tokenizer, asked = build_tokenizer(), query("fever " * 50, "rest", "drink water and see a doctor " * 10)

    def prompt(max_length: int) -> JudgePrompt:
        return JudgePrompt(tokenizer, JudgeConfig(max_length=max_length, credit=credit))

    response = encode_text(tokenizer, "rest and water " * 5)
    inputs = prompt(10**6).build_items(asked, response)
    shared = inputs[0].response_end  # the criterion comes after the response, so what stands before it is shared
    while len({tuple(i.input_ids[: shared + 1]) for i in inputs}) == 1:
        shared += 1
    lengths = [len(i.input_ids) for i in inputs]
    longest = max(lengths) if credit == "per_item" else shared + sum(n - shared for n in lengths)
    prompt(longest).check_query(asked, len(response))
    prompt(longest).build_items(asked, response)
    with pytest.raises(UserError, match=f"judge.max_length: .*query 'q' is {longest} tokens with a response of"):
        prompt(longest - 1).check_query(asked, len(response))


def test_benchmark_runs():
    """benchmarks/read_rows.py reads its own rows and prints times and memory; each row of it is different."""
    done = subprocess.run([sys.executable, BENCHMARK, "--rows", "30"], capture_output=True, text=True, timeout=800)
    assert done.returncode == 0, done.stderr
    assert "30 rows: " in done.stdout and "peak memory" in done.stdout and "cpu_seconds: " in done.stdout
    rows = [load("benchmarks/read_rows.py").make_row(i) for i in range(2)]
    texts = [item["criterion"] for row in rows for item in row["rubrics"]]
    assert len(set(texts)) == 24 and 200 < len(texts[0]) < 320
