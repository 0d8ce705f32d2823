"""Tokenizers from the files that model directories really hold: ``tokenizer.model`` alone, ``tokenizer.json``, or both.

Ids of a ``tokenizer.model`` are sentencepiece's own, whatever the configs beside it name; a ``tokenizer.json`` is taken
as it is; text stays data, decodes to itself and leaves no stray blanks in prompts; bad files are one line. The models
are trained here, with vocabularies of a few hundred pieces. Leaves out normalising models' decoding (what they drop is
gone) and tokenizers made of vocab.json and merges.txt, which transformers builds.
"""

import io
import json
import random
from pathlib import Path

import pytest
import sentencepiece
from transformers import LlamaTokenizer, PreTrainedTokenizerFast

from g2r_megatron.config.options import JudgeConfig
from g2r_megatron.data.tokenizer import (
    chat_parts,
    encode_parts,
    encode_text,
    leading_ids,
    load_tokenizer,
    render_prompt,
    special_ids,
    stop_token_ids,
    token_texts,
)
from g2r_megatron.data.types import Query, RubricItem
from g2r_megatron.errors import UserError
from g2r_megatron.judge.prompt import JudgePrompt, verdict_ids
from tiny_models import build_tokenizer, write_vocabulary

CORPUS = [
    "user assistant system: the answer is True or False, true or false; untrue, TrueFalse </> <0x>",
    "Below are a conversation, a response to it, and one criterion. Does the response meet the criterion?",
    "A note on fever and rash: rest, drink water, see a doctor if it lasts longer than 3 days (or 45 hours).",
] * 20
# As Llama 2, Mistral and Gemma train them: nothing is normalised, blanks are kept.
PLAIN = dict(normalization_rule_name="identity", remove_extra_whitespaces=False, allow_whitespace_only_pieces=True)
KINDS = {
    "bpe": dict(model_type="bpe", **PLAIN),
    "unigram": dict(model_type="unigram", **PLAIN),
    "bpe_no_first_blank": dict(
        model_type="bpe", add_dummy_prefix=False, user_defined_symbols=["<turn>", "\n\n", "▁▁▁"], **PLAIN
    ),
    "unigram_no_first_blank": dict(model_type="unigram", add_dummy_prefix=False, **PLAIN),
    "bpe_normalising": dict(model_type="bpe"),
    "unigram_normalising": dict(model_type="unigram"),
    "bpe_unknown": dict(model_type="bpe", byte_fallback=False, **PLAIN),
}
PLAIN_KINDS = [name for name, options in KINDS.items() if "remove_extra_whitespaces" in options][:4]
INSTRUCT = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)
LLAMA = dict(
    tokenizer_class="LlamaTokenizer",
    bos_token="<s>",
    eos_token="</s>",
    unk_token="<unk>",
    add_bos_token=True,
    add_eos_token=False,
    legacy=True,
    added_tokens_decoder={str(i): {"content": t, "special": True} for i, t in enumerate(["<unk>", "<s>", "</s>"])},
    chat_template=INSTRUCT,
)
HOSTILE = ["</s>", "<s>", "a</s>b", "</s></s>", "<unk>", " <s> [INST]", "<0x0A>", "<|im_end|>", "x<s>\n</s>"]


def train(directory: Path, **options) -> Path:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS),
        model_writer=model,
        minloglevel=2,
        hard_vocab_limit=False,
        **dict(vocab_size=420, byte_fallback=True) | options,
    )
    (directory / "tokenizer.model").write_bytes(model.getvalue())
    return directory


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """``trained(kind)`` -> (directory with only a tokenizer.model, sentencepiece's own processor)."""
    made = {}

    def get(kind: str) -> tuple[Path, sentencepiece.SentencePieceProcessor]:
        if kind not in made:
            directory = train(tmp_path_factory.mktemp(kind), **KINDS[kind])
            made[kind] = directory, sentencepiece.SentencePieceProcessor(str(directory / "tokenizer.model"))
        return made[kind]

    return get


@pytest.fixture
def directory(trained, tmp_path):
    """``directory(kind, config, model_type)`` -> a new directory as published: model, tokenizer_config, config."""

    def make(kind: str = "bpe", config: dict | None = LLAMA, model_type: str = "llama") -> Path:
        path = tmp_path / "model"
        path.mkdir()
        (path / "tokenizer.model").write_bytes((trained(kind)[0] / "tokenizer.model").read_bytes())
        (path / "config.json").write_text(json.dumps({"model_type": model_type}))
        if config is not None:
            (path / "tokenizer_config.json").write_text(json.dumps(config))
        return path

    return make


def texts(count: int = 300) -> list[str]:
    """Words, blanks and line breaks in any order, and random characters of many alphabets."""
    chance = random.Random(5)
    words = [
        "the",
        "True",
        "False",
        "criterion",
        "3",
        "45",
        "naïve",
        "Ωmega",
        "中文",
        "😀",
        "👩‍⚕️",
        "é",
        "e\u0301",
        ".",
        "\t",
        "\n",
    ]
    blanks = ["", " ", "  ", "\n", "\n\n", "     "]
    ranges = [(32, 127), (160, 768), (0x4E00, 0x4F00), (0x1F600, 0x1F650), (10, 11), (32, 33)]
    made = [" a", "  a  b ", " ", "\n\nx\n", "a\u00a0b", "\ufeffa", "▁a", "a\x00b", "\r\n"]
    for _ in range(count):
        made.append("".join(chance.choice(words) + chance.choice(blanks) for _ in range(chance.randint(1, 12))))
        made.append("".join(chr(chance.randrange(*chance.choice(ranges))) for _ in range(chance.randint(1, 20))))
    return made


# Ids.


@pytest.mark.parametrize("kind", KINDS)
def test_ids_are_sentencepieces_own(trained, kind):
    """Byte fallback, unknown characters, runs of blanks, the blank before a text, normalisation rules."""
    path, original = trained(kind)
    tokenizer = load_tokenizer(path)
    assert isinstance(tokenizer, PreTrainedTokenizerFast) and len(tokenizer) == original.get_piece_size()
    for text in ["", *texts(), *HOSTILE]:
        assert encode_text(tokenizer, text) == original.encode(text), text
    for text in texts(50):
        assert tokenizer(text, add_special_tokens=False).input_ids == original.encode(text), text
    assert tokenizer.convert_ids_to_tokens(range(len(tokenizer))) == [
        original.id_to_piece(i) for i in range(len(tokenizer))
    ]


@pytest.mark.parametrize("model_type", ["llama", "mistral", "mixtral", "gemma", "qwen2"])
@pytest.mark.parametrize("named", ["LlamaTokenizer", "GemmaTokenizer", None])
def test_ids_do_not_depend_on_what_the_configs_name(trained, directory, named, model_type):
    """transformers chooses a conversion by model_type and tokenizer_class, most of them with other ids."""
    _, original = trained("unigram")
    tokenizer = load_tokenizer(directory("unigram", {**LLAMA, "tokenizer_class": named}, model_type))
    for text in texts(20):
        assert encode_text(tokenizer, text) == original.encode(text)


@pytest.mark.parametrize("kind", ["bpe", "unigram", "bpe_no_first_blank", "unigram_no_first_blank"])
@pytest.mark.parametrize("config", [LLAMA, None], ids=["published", "no_config"])
def test_text_never_becomes_a_special_token(directory, kind, config):
    """Not alone, not inside other text, not across the seams of parts; the same words in trusted text are tokens."""
    tokenizer = load_tokenizer(directory(kind, config))
    assert special_ids(tokenizer) == {1, 2}
    for text in HOSTILE:
        for data in (text, text * 3, "the" + text + "answer", " " + text):
            assert special_ids(tokenizer).isdisjoint(encode_text(tokenizer, data))
            assert special_ids(tokenizer).isdisjoint(encode_text(tokenizer, data, continues=True))
            assert tokenizer.decode(encode_text(tokenizer, data)) == data
    mixed = encode_parts(tokenizer, [("<s>", True), ("<", False), ("/s>", False), ("</s>", True), ("</s>", False)])
    assert [i for i in mixed if i in (1, 2)] == [1, 2] and mixed[0] == 1 and mixed[-1] != 2


def test_added_tokens(directory):
    """Tokens of tokenizer_config.json beyond the pieces get the numbers it states, and are parsed in trusted text."""
    added = {**LLAMA["added_tokens_decoder"], "420": {"content": "<|im_end|>", "special": True}}
    tokenizer = load_tokenizer(directory("bpe", {**LLAMA, "added_tokens_decoder": added}))
    assert encode_parts(tokenizer, [("<|im_end|>", True)]) == [420] and len(tokenizer) == 421
    assert 420 in special_ids(tokenizer) and 420 not in encode_text(tokenizer, "a<|im_end|>")


# Decoding.


@pytest.mark.parametrize("kind", PLAIN_KINDS)
def test_text_decodes_to_itself(trained, kind):
    tokenizer = load_tokenizer(trained(kind)[0])
    for text in [*texts(), *HOSTILE]:
        if "▁" in text:
            continue  # sentencepiece's sign for a blank, and decoded as one
        ids = encode_text(tokenizer, text)
        assert tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False) == text
        pieces = token_texts(tokenizer, ids)
        assert len(pieces) == len(ids) and "".join(pieces) == text


def test_token_texts(trained):
    """A character of several bytes is printed at its last byte; the blank before a text is not part of it."""
    path, original = trained("bpe")
    tokenizer = load_tokenizer(path)
    ids = original.encode("the the 😀😀\n")
    assert token_texts(tokenizer, ids) == ["the", " the", " ", "", "", "", "😀", "", "", "", "😀", "\n"]
    smile = [original.piece_to_id(f"<0x{byte:02X}>") for byte in "😀".encode()]
    the = original.piece_to_id("▁the")
    assert token_texts(tokenizer, [*smile, the, 2]) == ["", "", "", "😀", " the", "</s>"]
    assert token_texts(tokenizer, smile[:2]) == ["", "\ufffd\ufffd"]  # cut off
    assert token_texts(tokenizer, [smile[1], *smile, the])[:1] + token_texts(tokenizer, [smile[1], *smile, the])[
        4:
    ] == [
        "\ufffd",
        "😀",
        " the",
    ]  # a byte that begins no character does not spoil the next one


# Prompts, judge inputs, stopping.


@pytest.mark.parametrize("kind", ["bpe", "bpe_no_first_blank"])
def test_prompts_have_the_usual_ids(trained, directory, kind):
    """The chat template's prompt as transformers tokenizes it; without a template, begin-of-text and the text."""
    _, original = trained(kind)
    tokenizer = load_tokenizer(directory(kind))
    messages = [
        {"role": "user", "content": "the rash"},
        {"role": "assistant", "content": "a note"},
        {"role": "user", "content": "  and\nfever?"},
    ]
    ids = encode_parts(tokenizer, chat_parts(tokenizer, messages, "test"))
    assert ids == tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    assert ids[0] == 1 and ids.count(2) == 1
    plain = render_prompt(tokenizer, messages[:1], chat_template=False, where="test")
    assert plain == [1, *original.encode("user: the rash\nassistant:")] and leading_ids(tokenizer) == (1,)


def test_text_after_special_tokens_follows_the_tokenizer(directory):
    """A tokenizer.json that puts its blank at the very beginning only (Metaspace "first") keeps its ids in parts."""
    path = directory("bpe")
    LlamaTokenizer.from_pretrained(path, legacy=False).save_pretrained(path)
    tokenizer = load_tokenizer(path)
    for text in ("<s>the answer</s>the</s> the", "the</s>answer", "the answer", "<s>"):
        expected = tokenizer(text, add_special_tokens=False, split_special_tokens=False).input_ids
        assert encode_parts(tokenizer, [(text, True)]) == expected
    the = tokenizer.convert_tokens_to_ids(["▁the", "t"])
    assert encode_parts(tokenizer, [("the<s>t", True)]) == [the[0], 1, the[1]]


@pytest.mark.parametrize("kind", ["bpe", "unigram", "bpe_no_first_blank"])
def test_judge_input_has_no_stray_blanks(directory, kind):
    """What follows the response continues it: the whole input decodes to the template filled in, special ids aside."""
    tokenizer = load_tokenizer(directory(kind))
    template = "Conversation: {conversation}\nResponse:{response}\n\nCriterion: {criterion} Verdict:"
    prompt = JudgePrompt(tokenizer, JudgeConfig(template=template, chat_template=False))
    body = encode_text(tokenizer, " the answer </s> is 😀", continues=True)
    item = RubricItem("Is it true", 1.0)
    query = Query("1", ({"role": "user", "content": "fever<s>?"},), (item,))
    built = prompt.build(query, item, body)
    assert built.input_ids[0] == 1 and special_ids(tokenizer).isdisjoint(built.input_ids[1:])
    assert built.input_ids[built.response_start : built.response_end] == body
    assert tokenizer.decode(built.input_ids[1:]) == (
        "Conversation: user: fever<s>?\nResponse: the answer </s> is 😀\n\nCriterion: Is it true Verdict:"
    )


def test_verdict_words_with_and_without_blank(trained, directory):
    """After "Verdict:" a model says "▁True", after a line break "True": both are verdicts when both are pieces."""
    _, original = trained("bpe")
    tokenizer = load_tokenizer(directory("bpe"))
    found = {original.id_to_piece(i) for i in verdict_ids(tokenizer, ["True", "False"], "judge.true_words")}
    pieces = {original.id_to_piece(i) for i in range(original.get_piece_size())}
    assert found == {"True", "▁True", "False", "▁False"} & pieces and {"False", "▁True"} <= found
    with pytest.raises(UserError, match="single token"):
        verdict_ids(tokenizer, ["zebra"], "judge.true_words")


def test_stop_tokens(directory):
    """The model's own, generation_config.json's, the template's end of turn; words and a line break are one token."""
    path = directory("bpe")
    assert stop_token_ids(load_tokenizer(path)) == {2}
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 7]}))
    tokenizer = load_tokenizer(path)
    newline = tokenizer.convert_tokens_to_ids("<0x0A>")
    assert stop_token_ids(tokenizer, ["</s>", "\n"]) == {2, 7, newline}
    with pytest.raises(UserError, match=r"rollout\.stop"):
        stop_token_ids(tokenizer, ["zebra"])


def test_stop_token_without_configs(trained):
    """A directory with nothing but the model: its own begin and end tokens count."""
    tokenizer = load_tokenizer(trained("bpe")[0])
    assert stop_token_ids(tokenizer) == {2}
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.unk_token) == ("<s>", "</s>", "<unk>")


# tokenizer.json.


def test_tokenizer_json_is_used_when_both_are_there(trained, directory):
    """As in transformers; here one that was made from the tokenizer.model, with a template of its own."""
    path = directory("bpe")
    before = load_tokenizer(path)
    before.save_pretrained(path)
    after = load_tokenizer(path)
    assert after.backend_tokenizer.to_str() == before.backend_tokenizer.to_str()
    assert (after.bos_token, after.eos_token, after.chat_template) == ("<s>", "</s>", INSTRUCT)
    (path / "tokenizer.model").write_bytes((trained("unigram")[0] / "tokenizer.model").read_bytes())
    assert all(encode_text(load_tokenizer(path), t) == encode_text(before, t) for t in texts(20))


def test_tokenizer_json_is_taken_as_it_is(tmp_path):
    """transformers rebuilds every tokenizer of a ``qwen2`` directory as Qwen's, with other ids for other rules."""
    build_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen2"}))
    tokenizer = load_tokenizer(tmp_path)
    for text in texts(20):
        assert encode_text(tokenizer, text) == build_tokenizer()(text).input_ids


# Added tokens.


def added(number: int, text: str, special: bool) -> dict:
    return {"id": number, "content": text, "special": special, "normalized": False} | dict.fromkeys(
        ("single_word", "lstrip", "rstrip"), False
    )


def in_tokenizer_json(path: Path) -> None:
    build_tokenizer().save_pretrained(path)
    whole = json.loads((path / "tokenizer.json").read_text())
    whole["added_tokens"] += [added(400, "<late>", True), added(390, "<gap>", False)]
    (path / "tokenizer.json").write_text(json.dumps(whole))


def beside_vocab_and_merges(path: Path) -> None:
    write_vocabulary(build_tokenizer(), path)
    (path / "config.json").write_text(json.dumps({"model_type": "qwen2"}))
    (path / "added_tokens.json").write_text(json.dumps({"<gap>": 390}))
    decoder = {"400": {"content": "<late>", "special": True}, "390": {"content": "<gap>", "special": False}}
    (path / "tokenizer_config.json").write_text(
        json.dumps({"added_tokens_decoder": decoder, "eos_token": "<|im_end|>"})
    )


@pytest.mark.parametrize("files", [in_tokenizer_json, beside_vocab_and_merges])
def test_added_tokens_keep_ids_that_leave_gaps(tmp_path, files):
    """The tokenizers library would number them 383 and 384, without a word."""
    files(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    assert [tokenizer.convert_tokens_to_ids(token) for token in ("<gap>", "<late>", "<|im_end|>")] == [390, 400, 2]
    assert encode_parts(tokenizer, [("a<late>b<gap>", True)]) == [67, 400, 68, 390]
    assert special_ids(tokenizer).isdisjoint(encode_text(tokenizer, "a<late>b"))
    assert tokenizer.decode([67, 400, 390]) == "a<late><gap>"
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": 400}))
    assert stop_token_ids(tokenizer) == {2, 400}


# Bad input.


def _write(name: str, content: str | bytes):
    def change(path: Path) -> None:
        (path / name).write_bytes(content if isinstance(content, bytes) else content.encode())

    return change


def _cut(count: int):
    def change(path: Path) -> None:
        (path / "tokenizer.model").write_bytes((path / "tokenizer.model").read_bytes()[:count])

    return change


def _config(**fields):
    return _write("tokenizer_config.json", json.dumps({**LLAMA, **fields}))


BAD = {
    "no_files": (lambda path: (path / "tokenizer.model").unlink(), "has no tokenizer files"),
    "vocab_without_merges": (
        lambda path: (path / "tokenizer.model").rename(path / "vocab.json"),
        "has no tokenizer files",
    ),
    "empty_model": (_cut(0), "tokenizer.model: not a sentencepiece model, or cut off"),
    "model_cut_in_a_piece": (_cut(3000), "tokenizer.model: not a sentencepiece model"),
    "model_cut_before_its_rules": (_cut(-16), "tokenizer.model: not a sentencepiece model, or cut off"),
    "random_model": (_write("tokenizer.model", random.Random(1).randbytes(4000)), "not a sentencepiece model"),
    "tiktoken_model": (_write("tokenizer.model", "IQ== 0\nIg== 1\n"), "it is of tiktoken, not of sentencepiece"),
    "broken_json": (_write("tokenizer.json", '{"model": '), "cannot be read"),
    "json_of_nothing": (_write("tokenizer.json", "{}"), "cannot be read"),
    "broken_config": (_write("tokenizer_config.json", '{"bos_token": '), "tokenizer_config.json: not readable as JSON"),
    "config_is_a_list": (_write("tokenizer_config.json", "[]"), "must be a JSON object"),
    "config_is_binary": (_write("tokenizer_config.json", b"\xff\xfe\x00"), "not readable as JSON"),
    "remote_code": (_config(auto_map={"AutoTokenizer": ["tokenization_x.X", None]}), "never run"),
    "remote_code_as_a_list": (_config(auto_map=["tokenization_x.X", None]), "never run"),
    "wrong_number": (_config(added_tokens_decoder={"5": {"content": "<x>"}}), "'<x>' is said to be 5, but is 420"),
    "lfs_pointer": (
        _write("tokenizer.json", "version https://git-lfs.github.com/spec/v1\noid"),
        "is a Git LFS pointer",
    ),
    "web_page": (_write("tokenizer_config.json", "<!DOCTYPE html>"), "is a web page"),
    "strange_added_token": (_config(added_tokens_decoder={"a": 1}), "cannot be read"),
    "wrong_number_in_added_tokens": (_write("added_tokens.json", '{"<s>": 5}'), "'<s>' is said to be 5, but is 1"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_files_are_one_line(directory, name):
    """Each names the file or directory and what is wrong with it; no other exception comes out."""
    change, message = BAD[name]
    path = directory("bpe")
    change(path)
    with pytest.raises(UserError, match=message) as error:
        load_tokenizer(path)
    assert "\n" not in str(error.value) and str(path) in str(error.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(model_type="char"), "model type CHAR"),
        (dict(model_type="unigram", treat_whitespace_as_suffix=True), "blanks are not the beginning"),
        (dict(model_type="bpe", user_defined_symbols=["<turn>"], **PLAIN), "user-defined pieces"),
        (dict(model_type="bpe", user_defined_symbols=["a b"], add_dummy_prefix=False, **PLAIN), "user-defined pieces"),
    ],
)
def test_models_that_do_not_convert_exactly_are_refused(tmp_path, options, message):
    with pytest.raises(UserError, match=message):
        load_tokenizer(train(tmp_path, **options))
