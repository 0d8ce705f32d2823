"""Tokenizer files as model directories of strangers hold them, beside or in place of ``tokenizer.json``.

What transformers reads is read alike; what no file can say, or only code or another library reads, is refused in one line.
Leaves out ``tokenizer.model`` (test_tokenizer_files.py) and what templates render (test_chat_templates.py).
"""

import json
from pathlib import Path

import pytest
from transformers import AddedToken, AutoTokenizer

from g2r_megatron.config.options import JudgeConfig
from g2r_megatron.data.tokenizer import load_tokenizer, render_prompt, stop_token_ids
from g2r_megatron.errors import UserError
from g2r_megatron.judge.prompt import JudgePrompt
from tiny_models import CHATML, build_tokenizer, write_vocabulary

CODE = {"AutoTokenizer": ["tokenization_acme.AcmeTokenizer", None]}
END = {"content": "<|im_end|>", "lstrip": False, "normalized": False, "rstrip": False, "single_word": False}


@pytest.fixture
def directory(tmp_path) -> Path:
    """A directory with tokenizer.json, tokenizer_config.json and a chat template."""
    build_tokenizer().save_pretrained(tmp_path)
    return tmp_path


def configure(directory: Path, **fields) -> None:
    """Set fields of tokenizer_config.json; None leaves one out."""
    path = directory / "tokenizer_config.json"
    config = json.loads(path.read_text()) | fields
    path.write_text(json.dumps({name: value for name, value in config.items() if value is not None}))


def as_vocabulary(directory: Path) -> None:
    """vocab.json and merges.txt in the place of tokenizer.json."""
    write_vocabulary(build_tokenizer(), directory)
    (directory / "tokenizer.json").unlink()


def rendered(directory: Path) -> list[int]:
    return render_prompt(load_tokenizer(directory), ({"role": "user", "content": "a fever"},), True, "query 'q'")


def without_template(directory: Path) -> None:
    (directory / "chat_template.jinja").unlink(missing_ok=True)
    configure(directory, chat_template=None)


@pytest.mark.parametrize(
    "named", [{"eos_token": END}, {"eos_token": "<|im_end|>"}, {"eos_token": {"__type": "AddedToken", **END}}]
)
def test_special_tokens_of_the_map_beside_it(directory, named):
    """special_tokens_map.json counts where tokenizer_config.json does not name the token, as texts and as objects."""
    configure(directory, eos_token=None)
    (directory / "special_tokens_map.json").write_text(json.dumps(named))
    tokenizer = load_tokenizer(directory)
    assert tokenizer.eos_token == AutoTokenizer.from_pretrained(directory).eos_token == "<|im_end|>"


@pytest.mark.parametrize("named", ["AcmeTokenizer", "PreTrainedTokenizerFast", "LlamaTokenizerFast", None])
def test_the_class_that_is_named_changes_nothing_beside_tokenizer_json(directory, named):
    expected = load_tokenizer(directory)("a fever, 12 days\n")["input_ids"]
    configure(directory, tokenizer_class=named)
    assert load_tokenizer(directory)("a fever, 12 days\n")["input_ids"] == expected


def test_code_is_not_run(directory, capfd):
    """Beside tokenizer.json it is left alone, with a warning; alone it is refused. Empty entries are none."""
    configure(directory, auto_map={"AutoTokenizer": [None, None]})
    load_tokenizer(directory)
    assert not capfd.readouterr().err
    configure(directory, auto_map=CODE)
    assert load_tokenizer(directory).eos_token_id is not None
    assert "own code (['tokenization_acme.AcmeTokenizer', None]) is not run" in capfd.readouterr().err
    as_vocabulary(directory)
    with pytest.raises(UserError, match="code from a model directory is never run"):
        load_tokenizer(directory)


@pytest.mark.parametrize("named", ["Qwen2Tokenizer", "GPT2Tokenizer"])
def test_a_vocabulary_whose_class_is_named(directory, named):
    """vocab.json and merges.txt: how texts are split comes from the class, as in transformers."""
    as_vocabulary(directory)
    configure(directory, tokenizer_class=named)
    ours, theirs = load_tokenizer(directory), AutoTokenizer.from_pretrained(directory)
    for text in ("a fever, 12 days\n", "it's  two   blanks", "\u4f60\u597d"):
        assert ours(text)["input_ids"] == theirs(text)["input_ids"]


def test_a_vocabulary_without_a_class(directory):
    as_vocabulary(directory)
    configure(directory, tokenizer_class=None)
    with pytest.raises(UserError, match="do not say how texts are split.*Qwen2Tokenizer"):
        load_tokenizer(directory)


@pytest.mark.parametrize(
    ("name", "library"),
    [
        ("tekken.json", "mistral-common"),
        ("qwen.tiktoken", "tiktoken"),
        ("spiece.model", "sentencepiece"),
        ("vocab.txt", "BERT"),
    ],
)
def test_files_of_other_libraries(tmp_path, name, library):
    (tmp_path / name).write_text("{}")
    with pytest.raises(UserError, match=f"no tokenizer files but {name}, which is read by {library}"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_a_byte_order_mark(directory, name):
    path = directory / name
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    with pytest.raises(UserError, match=f"{name}: begins with a byte order mark"):
        load_tokenizer(directory)


def test_where_a_chat_template_may_be(directory):
    """In tokenizer_config.json as a text or by name, in chat_template.jinja, or in a processor's chat_template.json."""
    expected = rendered(directory)
    without_template(directory)
    assert load_tokenizer(directory).chat_template is None
    named = [{"name": "default", "template": CHATML}, {"name": "rag", "template": "x"}]
    for template in (CHATML, named):
        configure(directory, chat_template=template)
        assert rendered(directory) == expected
    without_template(directory)
    (directory / "chat_template.json").write_text(json.dumps({"chat_template": CHATML}))
    assert rendered(directory) == expected
    (directory / "chat_template.json").write_text(json.dumps({"chat_template": 5}))
    with pytest.raises(UserError, match="chat_template is a int"):
        load_tokenizer(directory)


def test_where_the_end_of_a_turn_is_stated(directory):
    """generation_config.json; without it config.json, also that of its text part, as transformers' generate does."""
    without_template(directory)
    own = set(stop_token_ids(load_tokenizer(directory)))
    (directory / "config.json").write_text(json.dumps({"eos_token_id": [3, 5, 10**6]}))
    assert set(stop_token_ids(load_tokenizer(directory))) == own | {3, 5}
    (directory / "config.json").write_text(json.dumps({"text_config": {"eos_token_id": 7}}))
    assert set(stop_token_ids(load_tokenizer(directory))) == own | {7}
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": [4]}))
    assert set(stop_token_ids(load_tokenizer(directory))) == own | {4}


@pytest.mark.parametrize(
    ("template", "stop"),
    [
        ("{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}", "<|im_end|>"),
        ("{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{% endfor %}", "<|user|>"),  # GLM's
        ("{% for m in messages %}{{ m.content }}{% if not loop.last %}<|next|>{% endif %}{% endfor %}", "<|next|>"),
        ("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}", None),
    ],
)
def test_what_ends_a_turn_of_the_template(directory, template, stop):
    """What closes it, or what comes before the next turn where nothing does."""
    tokenizer = load_tokenizer(directory)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|user|>", "<|assistant|>", "<|next|>"]})
    tokenizer.chat_template = template
    ends = {tokenizer.eos_token_id} | ({tokenizer.convert_tokens_to_ids(stop)} if stop else set())
    assert set(stop_token_ids(tokenizer)) == ends


def test_structure_of_the_judges_own_template(directory):
    """A marker that only judge.template writes must be special: else a response could write it too. Words may be added."""
    tokenizer = load_tokenizer(directory)
    tokenizer.add_tokens([AddedToken("<|judge|>", normalized=False), AddedToken("criterion:", normalized=False)])
    config = JudgeConfig(chat_template=False, template="<|judge|> {conversation} {response} criterion: {criterion}")
    with pytest.raises(UserError, match="judge.template: '<|judge|>' is an added token .* not call special"):
        JudgePrompt(tokenizer, config)
    special = load_tokenizer(directory)
    special.add_special_tokens({"additional_special_tokens": ["<|judge|>"]})
    JudgePrompt(special, config)
