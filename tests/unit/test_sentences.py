"""Sentences of many languages and forms of text; their places are exact, and tokens follow them.

Leaves out how good the rules are on a corpus: each case below is one rule or one known trap.
"""

import random
import time
from itertools import pairwise

import pytest

from g2r_megatron.credit.sentences import WINDOW_TOKENS, sentence_ids, sentences

CASES = {
    "decimal points": "Take 2.5 mg of v1.2.3, i.e. half. | It costs $3.50. | 4.5 is enough.",
    "abbreviations": "Ask Dr. Smith, e.g. today. | Mr. J. R. Jones vs. St. Mary et al. 2020 (cf. Fig. 3) won. | Yes.",
    "what may end or not": "It ends at 5 p.m. today. | We met at 8 a.m. | Apples, pears, etc. were sold. | And nuts etc. | Then we left.",
    "single letters": "George W. Bush spoke. | Take vitamin C. | Then rest in the U.S. Army.",
    "addresses": "See www.example.com/a.b?c=1!d or mail a.b@c.org. | Open file.txt now.",
    "several marks": "What?! | No... | Wait... or not. | Really!! | Yes…",
    "quotes and brackets": '"Really?" she asked. | “Yes!” | He left. | (See above.) | [Done.] | Then *stop.* | **Now.**',
    "no capitals": "i like it. | you should too. | ok? | fine",
    "list numbers": "Steps:\n|1. Rest. |Then drink.\n|2. Call Dr. No.\n   |a. First.\n|3) Sleep\n|(b) Walk",
    "bullets": "- one\n|* two. |More.\n|• three\n  |+ four, which goes on\n    in a second line.\n\n|Done.",
    "headings": "# Title\n\n|Text goes here. |**Bold line**\n|More text\n|> quoted\n|## End",
    "soft line breaks": "This line was\nwrapped. |And this\ntoo.\n\n|A new paragraph",
    "table": "| a | b. |\n|---|:--|\n¦| 1. x | 2! y |\n¦| 3 | 4 |\n\n¦Done.",
    "code": """Run this:\n|```python\nx = 1. \nif y? : z.\n\nprint("A. B!")\n```\n|It works. |Now:\n|~~~\nopen. Code""",
    "inline code": "Use `a.b()` here. | Then `c`.",
    "rules belong to what is before": "---\nOne.\n***\n|Two. |🎉 Three. !",
    "German": "Das ist z.B. gut, d.h. sehr gut. | Prof. Müller kommt um 8 Uhr. | Es sind ca. 3,5 km. | Ja!",
    "French": "M. Dupont est là ? | Oui ! | « Très bien. » | Mme. Durand aussi. | »Ja.« | Er ging.",
    "Spanish": "¿Qué tal? | ¡Muy bien! | El Sr. Pérez vino. | Vale.",
    "Russian": "Привет! | Как дела? | Всё хорошо. | Пока",
    "Greek": "Καλημέρα. | Τι κάνεις; Καλά!",
    "Chinese": "你好。|今天 3.5 度！|是吗？！|他说：“好。”|然后走了",
    "Japanese": "こんにちは。|元気ですか？|「はい。」|3．5です．|次",
    "Korean": "안녕하세요. | 잘 지내요? | 네!",
    "Hindi": "यह पहला वाक्य है। |यह 2.5 है॥ |ठीक है?",
    "Arabic and Urdu": "هل أنت بخير؟ |نعم. |یہ جملہ ہے۔ |اچھا",
    "Armenian and Amharic": "Բարև։ |Ինչպե՞ս ես։ |ሰላም። |እንዴት ነህ",
    "blank": "  \n ",
    "blanks at the start": "\n\n Hello. |Yes.",
}  # fmt: skip


def split(text: str) -> list[str]:
    return [text[span.start : span.end] for span in sentences(text)]


@pytest.mark.parametrize("name", CASES)
def test_rules(name):
    """``|`` (in the table ``¦``) stands where a sentence begins; blanks belong to the sentence before."""
    text = CASES[name] if name == "table" else CASES[name].replace(" | ", " |")
    expected = text.split("¦" if name == "table" else "|")
    assert split("".join(expected)) == expected


def random_texts() -> list[str]:
    """Pieces that the rules look at, in any order, and characters of many scripts."""
    chance, pieces = random.Random(5), []
    for case in CASES.values():
        pieces += case.split(" ")
    pieces += [
        *".!?。।«»*_~`|#-\n\n\t ",
        "```",
        "\n```\n",
        "1.",
        "e.g.",
        "A.",
        "\u00a0",
        "\u2028",
        "\r\n",
        "🎉",
        "e\u0301",
        "\ud800",
        "\x00",
    ]
    texts = [""]
    for _ in range(400):
        joint = chance.choice(["", " ", "\n"])
        texts.append(joint.join(chance.choice(pieces) for _ in range(chance.randint(1, 40))))
        texts.append("".join(chr(chance.randrange(1, 0x3100)) for _ in range(chance.randint(1, 60))))
    return texts


def test_the_sentences_of_a_text_are_the_text():
    """Whatever the text: spans are in order, not empty, without gaps, and cover it; so do the sentences of its tokens."""
    chance = random.Random(6)
    for text in random_texts():
        spans = sentences(text)
        assert "".join(split(text)) == text
        assert all(span.start < span.end for span in spans)
        cuts = sorted({0, len(text), *(chance.randrange(len(text) + 1) for _ in range(len(text) // 3))})
        tokens = [text[a:b] for a, b in pairwise(cuts)] or [""]
        ids = sentence_ids([*tokens, ""]).tolist()
        assert ids[0] == 0 and all(b - a in (0, 1) for a, b in pairwise(ids))


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        (["Take", " it", ".", " Then", " rest", "!"], [0, 0, 0, 1, 1, 1]),  # a blank before a word is the word's token
        (["Wait", ".", ".", ".", " Go"], [0, 0, 0, 0, 1]),
        (["One", ".\n", "\n", "Two"], [0, 0, 0, 1]),
        (["3", ".", "5", " mg", ".", " Yes"], [0, 0, 0, 0, 0, 1]),  # a decimal point that is a token of its own
        (["A", ". B", "."], [0, 0, 0]),  # the token in which a sentence ends and the next begins is of the first
        (["No", ".", "", "", " 你", "好"], [0, 0, 0, 0, 1, 1]),  # byte tokens: "" until the character is whole
        (["no", " end"], [0, 0]),
        ([], []),
    ],
)
def test_tokens_follow_the_sentences(tokens, expected):
    ids = sentence_ids(tokens)
    assert ids.tolist() == expected and str(ids.dtype) == "torch.int64"


@pytest.mark.parametrize("count", [1, 30, 31, 50, 200])
def test_text_without_sentence_ends_is_cut_into_windows(count):
    """Windows of about WINDOW_TOKENS tokens, all of nearly one size; a whole sentence of any length stays one."""
    ids = sentence_ids(["ไทย"] * count)
    sizes = ids.unique(return_counts=True)[1]
    assert len(sizes) == (1 if count <= 30 else round(count / WINDOW_TOKENS)) and int(sizes.max() - sizes.min()) <= 1
    assert sentence_ids([" word"] * count + ["."]).tolist() == [0] * (count + 1)
    before = sentence_ids(["Yes", ".", *[" Word"] * 100])
    assert before.tolist()[:3] == [0, 0, 1] and int(before[-1]) == 5


def test_no_text_takes_long():
    """Repetitions that make patterns start over at every character: a policy can sample any text.

    In seconds of the CPU: linear patterns take one, others minutes.
    """
    start = time.process_time()
    for text in (
        "." * 20000,
        '."' * 10000,
        "\n" * 20000,
        "`" * 20000,
        "a" * 20000 + ". B",
        "A. " * 9000,
        "```\n" * 5000,
    ):
        assert "".join(split(text)) == text
    assert time.process_time() - start < 5
