"""Hidden and deleted sentences, and attention paid, equal transformers with a mask, without the tokens, and with its attentions.

Log-probabilities to 1e-5, occlusion and attention to 1e-5 of their norm (fp32), of every item of one response; and what
training calls faithfulness, which is made of them. Leaves out experts, which choose for themselves in every run, and GPUs.
"""

from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM

from g2r_megatron.config.options import Layout
from g2r_megatron.credit.attribution import pooled_weights
from g2r_megatron.credit.faithfulness import Faithful
from g2r_megatron.data.tokenizer import encode_text, load_tokenizer
from g2r_megatron.judge.prompt import JudgePrompt
from test_parity_gates import Way, mask_of
from test_shared_prefix import QUERY, WEIGHTS, on, stage_of
from tiny_models import build_tiny_hf

RESPONSE = "A note on fever: rest. See a doctor! If it lasts longer than three days, a doctor can tell."
WINDOW = 24
CASES = [("tp1pp1", "qwen2", 8192), ("tp1pp1dp2", "qwen3", 8192), ("cp2", "qwen3", 90), ("tp2pp2sp", "qwen3", 1)]


def options(budget: int, attribution: str, credit: str = "per_item"):
    return replace(Way(credit=credit, budget=budget).config(), attribution=attribution)


# In the ranks.


def measured(layout: Layout, path: str, name: str, budget: int) -> dict:
    """Spans of the sentences; log-probs [items][1 + sentences][2] hidden and deleted; b of each attribution, its faithfulness."""
    from g2r_megatron.judge.faithfulness import measure_faithfulness
    from g2r_megatron.judge.hiding import read_deleted, read_hidden

    found: dict = {}
    for kind, credit in (("occlusion", "per_item"), ("attention", "per_item"), ("attention", "per_response")):
        stage = stage_of(path, name, options(budget, kind, credit))
        body = encode_text(stage.prompt.tokenizer, RESPONSE)
        rows = stage.inputs([QUERY], [body])
        judgements = stage.verdicts(rows, ["0"])
        stage.attribute(rows, judgements, [[True] * 3], [list(WEIGHTS)])
        found[kind, credit] = [judgement.attribution.tolist() for judgement in judgements[0]]
        spans = stage.sentences(rows[0][0])
        (faithful,) = measure_faithfulness(stage, rows, judgements, [list(WEIGHTS)], ["0"], 1) or [None]
        found["faithful", kind, credit] = faithful
    found["spans"] = spans
    found["hidden"] = [values.tolist() for values in read_hidden(stage.judge, rows[0], [spans] * 3)]
    found["deleted"] = [values.tolist() for values in read_deleted(stage.judge, rows[0], [spans] * 3)]
    return found


# The reference.


class Reference:
    """transformers, one sequence at a time."""

    def __init__(self, path: str):
        self.model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager").eval()
        tokenizer = load_tokenizer(path)
        self.prompt = JudgePrompt(tokenizer, Way().config())
        self.items = self.prompt.build_items(QUERY, encode_text(tokenizer, RESPONSE))

    @torch.no_grad()
    def log_probs(self, ids: list[int], mask=None) -> list[float]:
        logits = self.model(torch.tensor([ids]), attention_mask=mask).logits[0, -1].log_softmax(-1)
        return [logits[spelled].logsumexp(0).item() for spelled in (self.prompt.true_ids, self.prompt.false_ids)]

    def hidden(self, item, begin: int, end: int) -> list[float]:
        """No position after the part may attend to it, in any layer."""
        mask = mask_of(self.model, torch.ones(item.response_end - item.response_start), item, "all")
        start = item.response_start
        for part in mask.values() if isinstance(mask, dict) else [mask]:
            part[..., start + end :, start + begin : start + end] = -1e30
        return self.log_probs(item.input_ids, mask)

    def deleted(self, item, begin: int, end: int) -> list[float]:
        start = item.response_start
        return self.log_probs(item.input_ids[: start + begin] + item.input_ids[start + end :])

    @torch.no_grad()
    def attention(self, item) -> torch.Tensor:
        """Mean over layers and heads of what the last position pays each response token."""
        seen = self.model(torch.tensor([item.input_ids]), output_attentions=True).attentions
        return torch.cat(seen)[:, :, -1, item.response_start : item.response_end].mean((0, 1))


def close(found, expected) -> None:
    found, expected = torch.tensor(found), torch.as_tensor(expected)
    assert (found - expected).norm() <= 1e-5 * expected.norm()


@pytest.mark.parametrize(("layout", "family", "budget"), CASES)
def test_equals_transformers(worlds, tmp_path, layout, family, budget):
    """Also with a window shorter than the prefix (qwen2), suffixes cut into many micro-batches, and items combined by weights."""
    windows = dict(use_sliding_window=True, sliding_window=WINDOW, max_window_layers=2) if family == "qwen2" else {}
    path = str(build_tiny_hf(family, tmp_path, **windows))
    found = on(worlds, layout, measured, path, layout, budget)
    reference, spans = Reference(path), found["spans"]
    assert len(spans) == 3 and spans[0][0] == 0
    masses, losses = [], []
    for k, item in enumerate(reference.items):
        whole = reference.log_probs(item.input_ids)
        hidden = [reference.hidden(item, *span) for span in spans]
        torch.testing.assert_close(*map(torch.tensor, (found["hidden"][k], [whole, *hidden])), atol=1e-5, rtol=0)
        deleted = [reference.deleted(item, *span) for span in spans]
        torch.testing.assert_close(*map(torch.tensor, (found["deleted"][k], [whole, *deleted])), atol=1e-5, rtol=0)
        lost = [(whole[0] - whole[1]) - (true - false) for true, false in hidden]
        losses.append(lost)
        b = [loss / (end - begin) for loss, (begin, end) in zip(lost, spans, strict=True) for _ in range(begin, end)]
        assert found["occlusion", "per_item"][k] == pytest.approx(b, abs=1e-5)
        masses.append(reference.attention(item))
        close(found["attention", "per_item"][k], masses[-1])
    factors = pooled_weights(list(WEIGHTS))
    combined = sum(c * mass for c, mass in zip(factors, masses, strict=True))
    for b in found["attention", "per_response"]:
        close(b, combined)
    combined_loss = [sum(c * loss for c, loss in zip(factors, of, strict=True)) for of in zip(*losses, strict=True)]
    credit = [float(combined[begin:end].sum()) for begin, end in spans]
    assert found["faithful", "attention", "per_response"] == Faithful.of(credit, combined_loss, "0")
    credits = [[float(mass[begin:end].sum()) for begin, end in spans] for mass in masses]
    of_items = [Faithful.of(credit, lost, "0") for credit, lost in zip(credits, losses, strict=True)]
    assert found["faithful", "attention", "per_item"] in of_items and found["faithful", "occlusion", "per_item"] is None
