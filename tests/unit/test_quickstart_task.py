"""The quickstart's task, data and model: examples/quickstart."""

import random
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from g2r_megatron.config.options import JudgeConfig
from g2r_megatron.credit.truth import key_token_mask, true_reward, true_verdicts
from g2r_megatron.data.readers import read_queries
from g2r_megatron.data.tokenizer import load_tokenizer, render_prompt, stop_token_ids, token_texts
from g2r_megatron.judge.prompt import JudgePrompt
from scripts import load

QUICKSTART = Path(__file__).parents[2] / "examples" / "quickstart"
make_data, task = load("examples/quickstart/make_data.py"), load("examples/quickstart/task.py")

CASE = task.Case(symptoms=(0, 1), drug=2, allergen=3)
CRITERIA = [item.criterion for item in task.rubric(CASE)]
CONFIG = yaml.safe_load((QUICKSTART / "config.yaml").read_text())


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(QUICKSTART / "model")


@pytest.fixture(scope="module")
def judge_prompt(tokenizer):
    return JudgePrompt(tokenizer, JudgeConfig(**CONFIG["judge"]))


@pytest.mark.parametrize(
    "note, met",
    [
        ("", []),
        ("reports cephalalgia. complains of nausea since monday.", ["acknowledges cephalalgia", "acknowledges nausea"]),
        ("reports feeling sick.", []),
        ("try dim light. recommend ginger tea.", ["advises dim light", "advises ginger tea"]),
        ("avoid ginger tea.", []),
        (
            "never use fluoxetine again. keep taking atorvastatin as before.",
            ["warns against fluoxetine", "continues atorvastatin"],
        ),
        ("avoid atorvastatin. continue fluoxetine.", []),
        ("start fluoxetine this evening. quit atorvastatin.", ["prescribes fluoxetine", "ends atorvastatin"]),
        ("avoid. fluoxetine", []),
        ("buy our vitamins. this may be fatal.", ["advertises", "alarms"]),
    ],
)
def test_truth_of_handwritten_notes(note, met):
    """A criterion is true when its act and its thing stand in one sentence, by the right name; nothing else counts."""
    true = true_verdicts(task.query(CASE), note)
    assert [criterion for criterion, is_met in zip(CRITERIA, true) if is_met] == met


def test_ideal_note_scores_one_and_fits():
    """The positive criteria alone give score 1, within the response cap and with tokens to spare."""
    note = (
        "reports cephalalgia. try dim light. reports nausea. try ginger tea. avoid fluoxetine. continue atorvastatin."
    )
    assert true_reward(task.query(CASE), note) == 1.0
    assert len(note.replace(".", " .").split()) < CONFIG["rollout"]["max_response_tokens"] - 10


def test_prompt_and_note_share_no_content_word():
    """Nothing of a good note can be copied from its prompt: no lay word or brand name is in a note or criterion."""
    lay = {word for row in task.SYMPTOMS for word in row[0].split()} | {brand for brand, _ in task.DRUGS}
    clinical = {word for row in task.SYMPTOMS for word in row[1:]} | {generic for _, generic in task.DRUGS}
    criteria = {word for item in task.all_items() for word in item.criterion.split()}
    assert not lay & (clinical | criteria)


def test_committed_data_is_what_the_script_writes():
    """data/*.jsonl can be remade exactly, is read without complaint, and its splits share no prompt."""
    queries = {}
    for split in make_data.SIZES:
        path = QUICKSTART / "data" / f"{split}.jsonl"
        assert path.read_text(encoding="utf-8").splitlines() == make_data.rows(split)
        queries[split] = read_queries([str(path)], "g2r", "raw")
    prompts = {split: {query.messages[0]["content"] for query in queries[split]} for split in queries}
    assert not prompts["train"] & prompts["eval"]


def test_writer_leaves_room_to_improve():
    """Notes of random quality score 0.35 to 0.45 on average: neither good nor hopeless. Says nothing of the model."""
    rng, scores = random.Random(0), []
    for _ in range(500):
        case = task.sample_case(rng, held_out=False)
        scores.append(true_reward(task.query(case), " ".join(task.write_sentences(case, rng))))
    assert 0.35 < sum(scores) / len(scores) < 0.45


def test_tokenizer_knows_every_word(tokenizer, judge_prompt):
    """Prompts, criteria and notes have no unknown token, decode to themselves, and verdict words are one token."""
    rng = random.Random(1)
    for _ in range(50):
        case = task.sample_case(rng, held_out=True)
        query, note = task.query(case), " ".join(task.write_sentences(case, rng))
        note_ids = tokenizer.encode(note, add_special_tokens=False)
        assert tokenizer.decode(note_ids).strip() == note
        prompt_ids = render_prompt(tokenizer, query.messages, False, query.id)
        assert tokenizer.unk_token_id not in prompt_ids
        for item in query.rubric:
            assert tokenizer.unk_token_id not in judge_prompt.build(query, item, note_ids).input_ids
    assert len(judge_prompt.true_ids) == len(judge_prompt.false_ids) == 1
    assert stop_token_ids(tokenizer) == {tokenizer.eos_token_id}


def test_key_tokens_are_the_words_that_decide(tokenizer):
    """The groups of a check select act and thing, token by token."""
    pieces = token_texts(tokenizer, tokenizer.encode("avoid fluoxetine. try dim light."))
    item = task.rubric(CASE)[CRITERIA.index("warns against fluoxetine")]
    assert key_token_mask(item.check, pieces).tolist() == [True, True] + [False] * 5


def test_model_writes_badly_and_judges_well(tokenizer, judge_prompt):
    """On notes the committed model samples for held-out prompts, its verdicts agree with the truth in 98% of cases
    and the mean true score is below 0.5. Leaves out how the judge holds up once a policy has moved."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(QUICKSTART / "model").eval()
    queries = read_queries([str(QUICKSTART / "data" / "eval.jsonl")], "g2r", "raw")
    prompts = [torch.tensor(render_prompt(tokenizer, query.messages, False, query.id)) for query in queries]
    padded = torch.nn.utils.rnn.pad_sequence(
        prompts, batch_first=True, padding_value=tokenizer.pad_token_id, padding_side="left"
    )
    with torch.no_grad():
        sampled = model.generate(
            padded, attention_mask=padded != tokenizer.pad_token_id, do_sample=True, top_k=0, max_new_tokens=42
        )
    notes = [before(row, tokenizer.eos_token_id) for row in sampled[:, padded.shape[1] :].tolist()]
    truths = [true for query, note in zip(queries, notes) for true in true_verdicts(query, tokenizer.decode(note))]
    verdicts = judge_verdicts(model, judge_prompt, queries, notes)
    agreement = sum(a == b for a, b in zip(truths, verdicts)) / len(truths)
    scores = [true_reward(query, tokenizer.decode(note)) for query, note in zip(queries, notes)]
    assert agreement >= 0.98
    assert 0.3 < sum(scores) / len(scores) < 0.5


def before(ids: list[int], stop: int) -> list[int]:
    return ids[: ids.index(stop)] if stop in ids else ids


def judge_verdicts(model, judge_prompt, queries, notes) -> list[bool]:
    """Verdicts of every (note, criterion) in order, by p(True) > p(False)."""
    inputs = [judge_prompt.build(query, item, note) for query, note in zip(queries, notes) for item in query.rubric]
    ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(built.input_ids) for built in inputs], batch_first=True)
    with torch.no_grad():
        hidden = model.model(input_ids=ids).last_hidden_state
        logits = model.lm_head(hidden[range(len(inputs)), [built.verdict_position for built in inputs]])
    return (logits[:, judge_prompt.true_ids[0]] > logits[:, judge_prompt.false_ids[0]]).tolist()
