"""A response moves from the policy's tokens to another tokenizer's and its credit comes back: by text, and losing nothing.

Pairs of byte-level BPEs, sentencepiece models (byte fallback, unigram, normalising, without bytes), a normalising
byte-level BPE and a word-level vocabulary; on random text of many alphabets, and on ids sampled at random from the whole
vocabulary, which spell no UTF-8. Held against spans found another way: pieces as transformers and sentencepiece name
them, byte by byte. Training with such a judge: test_other_tokenizer.py.
"""

import random
from functools import cache
from itertools import pairwise

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from g2r_megatron.config.options import JudgeConfig
from g2r_megatron.credit.alignment import Alignment, align
from g2r_megatron.credit.attribution import Weighting, alpha_from_attribution
from g2r_megatron.data.token_spans import decoded_bounds, encoded_bounds
from g2r_megatron.data.tokenizer import encode_text, load_tokenizer, neutral_ids, special_ids, stand_in_id
from g2r_megatron.data.types import Query, RubricItem
from g2r_megatron.judge.prompt import JudgePrompt
from test_tokenizer_files import KINDS, train
from tiny_models import build_tokenizer

BYTES = {char: byte for byte, char in bytes_to_unicode().items()}
CORPUS = [
    "credit flows by text: nothing is lost, naïve café 12.5 % of 345 words\n",
    "Привет, мир! 你好 😀 the rash\n",
] * 9
RANGES = [
    *((32, 127), (160, 768), (0x300, 0x370), (0x400, 0x460), (0x590, 0x5F0), (0x600, 0x660), (0x900, 0x980)),
    *((0xE01, 0xE5C), (0x200B, 0x2010), (0x202A, 0x202F), (0x4E00, 0x4F00), (0xAC00, 0xAD00), (0x1F1E6, 0x1F200)),
    *((0x1F600, 0x1F650), (0xE000, 0xE100), (0x10000, 0x10FFFF), (10, 11), (32, 33)),
]
WORDS = [
    *(
        "the",
        "True",
        "3",
        "345",
        "naïve",
        "Ωmega",
        "中文",
        "😀",
        "👩‍⚕️",
        "👨‍👩‍👧‍👦",
        "🇩🇪",
        "🏳️‍🌈",
        "é",
        "e\u0301",
        "a\u0323\u0302",
    ),
    *(
        "שלום",
        "مرحبا",
        "\u202eabc\u202c",
        "นี่",
        "हिन्दी",
        "ﬁ",
        "½",
        "\ufffd",
        "\x00",
        ".",
        "\t",
        "\n",
        "<s>",
        "<think>",
        "▁",
    ),
]


def byte_bpe(size: int, normalizer=None) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)  # as Llama 3: offsets without blanks
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def word_level() -> PreTrainedTokenizerFast:
    vocabulary = ["[UNK]", "</s>", "the", "True", "False", "rash", "3", "."]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", eos_token="</s>")


EXACT = ("small", "large", "bpe", "unigram", "bpe_no_first_blank")  # what they encode they spell
LOOSE = ("nfc", "bpe_normalising", "unigram_normalising", "bpe_unknown", "words")
PAIRS = [(policy, judge) for policy in (*EXACT, "bpe_unknown", "words") for judge in (*EXACT, *LOOSE)]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    @cache
    def get(name: str) -> PreTrainedTokenizerFast:
        made = {
            "small": build_tokenizer,
            "large": lambda: byte_bpe(460),
            "nfc": lambda: byte_bpe(440, normalizers.NFC()),
            "words": word_level,
        }
        return made[name]() if name in made else load_tokenizer(train(tmp_path_factory.mktemp(name), **KINDS[name]))

    return get


def texts(count: int, seed: int = 7) -> list[str]:
    chance = random.Random(seed)
    made = ["", " ", "a", "\n\n", "  the", "e\u0301 ", "😀" * 5, "ab" * 500]
    for _ in range(count):
        blanks = ["", " ", "  ", "\n"]
        made.append("".join(chance.choice(WORDS) + chance.choice(blanks) for _ in range(chance.randint(1, 15))))
        made.append("".join(chr(chance.randrange(*chance.choice(RANGES))) for _ in range(chance.randint(1, 30))))
    return made


def random_bodies(tokenizer, count: int) -> list[list[int]]:
    """Ids as a policy that has learnt nothing samples them: special ones, broken bytes, ids without a token."""
    chance = random.Random(11)
    made = [[], [len(tokenizer) + 5], [*special_ids(tokenizer)]]
    return made + [[chance.randrange(len(tokenizer) + 2) for _ in range(chance.randint(1, 60))] for _ in range(count)]


def bodies(tokenizer, count: int) -> list[list[int]]:
    return [encode_text(tokenizer, text, continues=True) for text in texts(count)] + random_bodies(tokenizer, count)


# The reference: bytes of pieces, one at a time.


def piece_bytes(tokenizer, name: str, token: int) -> bytes:
    piece = tokenizer.convert_ids_to_tokens(token)
    if piece is None:
        return b""
    if name in ("small", "large", "nfc"):
        return bytes(BYTES[char] for char in piece)
    if name == "words":
        return (" " + piece).encode()
    if piece.startswith("<0x"):
        return bytes.fromhex(piece[3:5])
    return piece.replace("▁", " ").encode()


def owners_of(tokenizer, name: str, ids: list[int]) -> tuple[str, list[list[int]]]:
    """The text, and for every byte of its UTF-8 the tokens that its six sixths come from."""
    raw = [(byte, t) for t, token in enumerate(ids) for byte in piece_bytes(tokenizer, name, token)]
    text, owners, start = "", [], 0
    while start < len(raw):
        for size in (4, 3, 2, 1):  # the longest stretch that reads as one character, whole or broken
            stretch = bytes(byte for byte, _ in raw[start : start + size])
            char = stretch.decode(errors="replace")
            if len(stretch) == size and len(char) == 1:
                break
        tokens = [t for _, t in raw[start : start + size]]
        width = len(char.encode())
        sixths = [t for t in tokens for _ in range(6 * width // size)]
        owners += [sixths[i : i + 6] for i in range(0, 6 * width, 6)]
        text, start = text + char, start + size
    return text, owners


def matrix(alignment: Alignment, rows: int) -> torch.Tensor:
    table = torch.zeros(rows, alignment.length, dtype=torch.float64)
    return table.index_put_((alignment.judge_tokens, alignment.policy_tokens), alignment.shares, accumulate=True)


# Bounds.


@pytest.mark.parametrize("name", [*EXACT, "bpe_unknown", "words"])
def test_bounds_of_sampled_ids(tokenizer, name):
    """The text is what the bytes of the tokens spell; each byte belongs to the token that it comes from."""
    t = tokenizer(name)
    for body in bodies(t, 60):
        text, bounds = decoded_bounds(t, body)
        expected, owners = owners_of(t, name, neutral_ids(t, body))
        assert text == expected and bounds.shape == (len(body) + 1,)
        assert bounds[0] == 0 and bounds[-1] == len(text.encode()) == len(owners) and (bounds.diff() >= 0).all()
        sizes = torch.zeros(len(body), dtype=torch.float64)
        for owner in owners:
            for token in owner:
                sizes[token] += 1 / 6
        torch.testing.assert_close(bounds.diff(), sizes)


@pytest.mark.parametrize("name", ["small", "large"])
def test_broken_bytes_read_as_the_tokenizer_shows_them(tokenizer, name):
    t = tokenizer(name)
    for body in random_bodies(t, 200):
        assert decoded_bounds(t, body)[0] == t.decode(neutral_ids(t, body))


@pytest.mark.parametrize("continues", [True, False])
@pytest.mark.parametrize("name", EXACT)
def test_bounds_of_encoded_text(tokenizer, name, continues):
    """The ids are ``encode_text``'s, and each token stands at the bytes that its piece spells."""
    t = tokenizer(name)
    for text in texts(80):
        ids, bounds = encoded_bounds(t, text, continues)
        assert ids == encode_text(t, text, continues)
        if "▁" in text and name not in ("small", "large"):
            continue  # spelled as a blank
        pieces, data = [piece_bytes(t, name, token) for token in ids], text.encode()
        if b"".join(pieces) == b" " + data:  # a text begins
            assert not continues
            pieces[0] = pieces[0][1:]
        ends = [int(end) for end in bounds.tolist()]
        assert [data[start:end] for start, end in pairwise(ends)] == pieces and ends[-1] == len(data)


def test_bounds_where_tokens_do_not_spell_the_text(tokenizer):
    """Composed letters, dropped blanks and unknown words stand where they came from."""
    cases = [
        ("nfc", "xo\u0302 o", [0, 1, 2.5, 4, 5, 6]),  # x, two bytes of ô for three of o and its accent, blank, o
        ("nfc", "x  e\u0301", [0, 1, 2, 3, 6]),
        ("words", "the zebra  3.", [0, 3, 9, 13]),
        ("bpe_unknown", "😀é the", [0, 6, 10]),
        ("bpe_normalising", "the  the", [0, 3, 8]),
    ]
    for name, text, expected in cases:
        ids, bounds = encoded_bounds(tokenizer(name), text, name != "bpe_normalising")
        assert bounds.tolist() == pytest.approx(expected), (name, tokenizer(name).convert_ids_to_tokens(ids))
    assert encoded_bounds(tokenizer("bpe_normalising"), "   ", True)[0] == []  # nothing to read


# Alignment.


@pytest.mark.parametrize(("policy", "judge"), PAIRS)
def test_credit_moves_by_bytes_and_nothing_is_lost(tokenizer, policy, judge):
    """Rows sum to 1, what is moved keeps its sum, order is kept, and tokens that share no text share no credit."""
    chance = torch.Generator().manual_seed(3)
    for body in bodies(tokenizer(policy), 25):
        text, policy_bounds = decoded_bounds(tokenizer(policy), body)
        ids, judge_bounds = encoded_bounds(tokenizer(judge), text, True)
        assert judge_bounds.shape == (len(ids) + 1,) and (judge_bounds.diff() >= 0).all()
        alignment = align(judge_bounds, policy_bounds)
        assert alignment.length == len(body)
        b = torch.randn(len(ids), generator=chance)
        alpha = b.softmax(0) if len(ids) else b
        moved = alignment.move(alpha)
        assert moved.shape == (len(body),) and moved.dtype == torch.float64 and (moved >= 0).all()
        assert float(moved.sum()) == pytest.approx(float(alpha.double().sum()), abs=1e-14)
        if not ids:
            assert not moved.any()
            continue
        assert judge_bounds[-1] == policy_bounds[-1] == len(text.encode())
        assert (alignment.judge_tokens.diff() >= 0).all() and (alignment.policy_tokens.diff() >= 0).all()
        table = matrix(alignment, len(ids))
        torch.testing.assert_close(table.sum(1), torch.ones(len(ids), dtype=torch.float64))
        low = torch.maximum(judge_bounds[:-1, None], policy_bounds[None, :-1])
        high = torch.minimum(judge_bounds[1:, None], policy_bounds[None, 1:])
        sizes = judge_bounds.diff()[:, None]
        overlap = (high - low).clamp(min=0) / sizes.clamp(min=1e-300)
        torch.testing.assert_close(table[sizes[:, 0] > 0], overlap[sizes[:, 0] > 0], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", EXACT)
def test_the_same_tokenizer_gives_the_identity(tokenizer, name):
    t = tokenizer(name)
    for text in texts(60):
        if "▁" in text:
            continue
        body = encode_text(t, text, continues=True)
        decoded, policy_bounds = decoded_bounds(t, body)
        ids, judge_bounds = encoded_bounds(t, decoded, True)
        assert ids == body and decoded == text
        values = torch.rand(len(body), dtype=torch.float64)
        assert torch.equal(align(judge_bounds, policy_bounds).move(values), values)


def bounds(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_tokens_without_text():
    """A judge token goes to what follows it, at the end to the last token with text; a policy token gets nothing."""
    values = torch.tensor([1.0, 2.0, 4.0, 8.0])
    assert align(bounds(0, 0, 2, 4, 4), bounds(0, 0, 3, 3, 4, 4)).move(values).tolist() == [0, 1 + 2 + 2, 0, 2 + 8, 0]
    assert align(bounds(0), bounds(0, 5, 6)).move(torch.zeros(0)).tolist() == [0, 0]
    assert align(bounds(0), bounds(0)).move(torch.zeros(0)).tolist() == []
    with pytest.raises(ValueError, match="texts of 2 and 3"):
        align(bounds(0, 2), bounds(0, 3))


def test_alpha_on_the_policys_tokens():
    """Softmax and standardising over the judge's tokens, pooling over the policy's; a b that says nothing is uniform."""
    alignment = align(bounds(0, 1, 4), bounds(0, 2, 3, 4))
    b = torch.tensor([1.0, 2.0])
    first, second = (float(x) for x in b.softmax(0))
    plain = [first + second / 3, second / 3, second / 3]
    found = alpha_from_attribution(b, Weighting("softmax", "none"), None, alignment)
    assert found.dtype == torch.float32 and found.tolist() == pytest.approx(plain)
    pooled = alpha_from_attribution(b, Weighting("softmax", "sentence"), torch.tensor([0, 0, 1]), alignment)
    assert pooled.tolist() == pytest.approx([sum(plain[:2]) / 2] * 2 + plain[2:])
    smeared = alpha_from_attribution(b, Weighting("softmax", "smear", gamma=0.5), None, alignment).double()
    weights = [plain[0] + 0.5 * plain[1] + 0.25 * plain[2], plain[1] + 0.5 * plain[2], plain[2]]
    assert smeared.tolist() == pytest.approx([w / sum(weights) for w in weights])
    standard = alpha_from_attribution(b, Weighting("softmax", "none", standardize=True), None, alignment)
    a, c = (float(x) for x in torch.tensor([-1.0, 1.0]).softmax(0))
    assert standard.tolist() == pytest.approx([a + c / 3, c / 3, c / 3])
    for useless in (torch.ones(2), torch.tensor([1.0, float("nan")])):
        found = alpha_from_attribution(useless, Weighting("softmax", "smear", gamma=0.5), None, alignment)
        assert torch.equal(found, torch.full((3,), 1 / 3))


# The judge's input.

QUERY = Query("q", ({"role": "user", "content": "a rash?"},), (RubricItem("is kind", 1.0),))
TEMPLATE = "{conversation} |{response}| {criterion} ="


def one_token_words(t) -> dict:
    """Options of the judge with verdict words that are one token of ``t``."""

    def known(words: list[str]) -> list[str]:
        return [w for w in words if len(ids := encode_text(t, w, continues=True)) == 1 and ids != [t.unk_token_id]]

    return dict(true_words=known(["True", "T", "1"]), false_words=known(["False", "F", "0"]), chat_template=False)


@pytest.mark.parametrize(("policy", "judge"), [p for p in PAIRS if p[1] != "words" and p[0] != p[1]])
def test_judge_input_holds_the_text(tokenizer, policy, judge):
    """Encoded by the judge's tokenizer as data, at the response's place; special ids of either never get through."""
    t, other = tokenizer(judge), tokenizer(policy)
    prompt = JudgePrompt(t, JudgeConfig(template=TEMPLATE, **one_token_words(t)), other)
    assert prompt.body_tokenizer is other
    empty = prompt.build(QUERY, QUERY.rubric[0], [])
    assert empty.response_start == empty.response_end
    for body in bodies(other, 10):
        built = prompt.build(QUERY, QUERY.rubric[0], body)
        text, _ = decoded_bounds(other, body)
        span = built.input_ids[built.response_start : built.response_end]
        assert span == encode_text(t, text, continues=True)
        assert built.input_ids[: built.response_start] == empty.input_ids[: empty.response_start]
        assert built.input_ids[built.response_end :] == empty.input_ids[empty.response_end :]
        assert built.verdict_position == len(built.input_ids) - 1
        assert special_ids(t).isdisjoint(span)
        response, alignment = prompt.response(body)
        assert list(response) == span and alignment.length == len(body)


def test_special_ids_of_the_policy_read_as_its_stand_in(tokenizer):
    t, other = tokenizer("bpe"), tokenizer("small")
    prompt = JudgePrompt(t, JudgeConfig(template=TEMPLATE, **one_token_words(t)), other)
    body = [*sorted(special_ids(other)), *encode_text(other, "</s><s>")]
    ids, _ = prompt.response(body)
    assert t.decode(ids) == other.decode([stand_in_id(other)]) * len(special_ids(other)) + "</s><s>"
    assert special_ids(t).isdisjoint(ids)


@pytest.mark.parametrize(
    ("template", "continues"),
    [
        ("{response} {conversation} {criterion}", False),
        ("<s>{response} {conversation} {criterion}", False),
        ("<s>\n{response} {conversation} {criterion}", True),
        ("{criterion}{response} {conversation}", True),
    ],
)
def test_a_response_that_begins_a_text_gets_the_blank_of_beginnings(tokenizer, template, continues):
    """Exactly where the judge's tokenizer puts one before other text; the blank is no part of the response's bytes."""
    t, other = tokenizer("bpe"), tokenizer("small")
    prompt = JudgePrompt(t, JudgeConfig(template=template, **one_token_words(t)), other)
    body = encode_text(other, "the rash")
    built = prompt.build(QUERY, QUERY.rubric[0], body)
    span = built.input_ids[built.response_start : built.response_end]
    assert span == encode_text(t, "the rash", continues)
    moved = prompt.response(body)[1].move(torch.ones(len(span)))
    assert float(moved.sum()) == pytest.approx(len(span))


def test_without_a_policy_tokenizer_nothing_changes(tokenizer):
    t = tokenizer("small")
    prompt = JudgePrompt(t, JudgeConfig(template=TEMPLATE, chat_template=False))
    for body in random_bodies(t, 5):
        ids, alignment = prompt.response(body)
        assert ids == neutral_ids(t, body) and alignment is None
    assert prompt.body_tokenizer is t
