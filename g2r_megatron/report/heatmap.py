"""Responses as token heat maps: one strip for each criterion, and one for the advantage."""

from collections import Counter
from dataclasses import dataclass
from html import escape

from g2r_megatron.report.charts import slot_class
from g2r_megatron.report.runs import Group, mean
from g2r_megatron.report.text import visible

MAX_TOKENS = 400  # of a response that are drawn; a note says how many are left out
FULL_SHADE = 8.0  # times the uniform weight 1/T; a token with this weight or more has the darkest shade
SHADE_POWER = 0.65  # shade = weight to this power; below 1, so that the uniform weight is visible
STOP = "■"  # shown in the place of the stop token, which has no text


@dataclass(frozen=True)
class Picked:
    """The sample that is drawn for a group. ``ess_share``: mean ESS/T of its attributions; 1 is flat."""

    group: Group
    sample: dict
    ess_share: float


def pick_samples(groups: list[Group]) -> list[Picked]:
    """One sample for each group that has attributions. The sample with the smallest ESS/T comes first.

    Runs with the same weights and seed at the start sample the same first responses. So the choice is by: the number of
    groups that have the response, then the earliest step, then the number of attributed items in all groups.
    """
    candidates = {group.slot: [s for s in group.runs[0].samples if attributed(s)] for group in groups}
    owners: dict[tuple, set[int]] = {}
    items: Counter[tuple] = Counter()
    for slot, samples in candidates.items():
        for sample in samples:
            owners.setdefault(_identity(sample), set()).add(slot)
            items[_identity(sample)] += len(attributed(sample))

    def rank(sample: dict) -> tuple:
        identity = _identity(sample)
        return -len(owners[identity]), sample["step"], -items[identity], identity

    picked = []
    for group in groups:
        if samples := candidates[group.slot]:
            best = min(samples, key=rank)
            shares = [1 / (len(i["alpha"]) * sum(a * a for a in i["alpha"])) for i in attributed(best)]
            picked.append(Picked(group, best, mean(shares)))
    return sorted(picked, key=lambda p: p.ess_share)


def attributed(sample: dict) -> list[dict]:
    """The items of a sample that have an alpha: every value is a number and one is not 0."""
    return [item for item in sample["items"] if item["alpha"] and None not in item["alpha"] and any(item["alpha"])]


def sample_card(picked: Picked, is_open: bool) -> str:
    """HTML: a ``<details>`` with the prompt, the advantage strip, a strip for each attributed item, and the other verdicts."""
    sample, group = picked.sample, picked.group
    true = "" if sample["true_reward"] is None else f", true score {sample['true_reward']:.2f}"
    rows = _advantage_row(sample)
    shaded = attributed(sample)
    rows += "".join(_item_row(item, sample["tokens"]) for item in shaded)
    rest = [item for item in sample["items"] if item not in shaded]
    return (
        f'<details class="sample"{" open" if is_open else ""}><summary><span class="chip {slot_class(group.slot)}">'
        f"{escape(group.label)}</span> step {sample['step']}, query {visible(str(sample['query_id']))}: "
        f"judged {sample['reward']:.2f}{true}, mean ESS/T {picked.ess_share:.2f}</summary>"
        f'<div class="prompt"><b>Prompt</b><p>{visible(str(sample["prompt"]))}</p></div>'
        f'<div class="strips">{rows}</div>{_unattributed(rest)}</details>'
    )


def _identity(sample: dict) -> tuple[str, str]:
    return str(sample["query_id"]), sample["response"]


def _advantage_row(sample: dict) -> str:
    """The strip of advantages. The largest one of the response has the darkest shade."""
    advantages = [value or 0.0 for value in sample["advantages"]]
    scale = max(map(abs, advantages), default=0.0) or 1.0
    tokens = sample["tokens"] + [STOP] * (len(advantages) - len(sample["tokens"]))
    rewards = sample["token_rewards"] + [None] * (len(tokens) - len(sample["token_rewards"]))
    spans = []
    for position, (token, advantage, reward) in enumerate(zip(tokens, advantages, rewards, strict=False), 1):
        tip = f"token {position} · advantage {advantage:+.3f}"
        tip += "" if reward is None else f" · reward {reward:+.4f}"
        spans.append(token_span(token, "good" if advantage >= 0 else "bad", abs(advantage) / scale, tip))
    label = f'<p class="what">Advantage</p><p class="fine">what the policy is trained with; darkest = ±{scale:.2f}</p>'
    return strip(label, spans, "advantage")


def _item_row(item: dict, tokens: list[str]) -> str:
    length = len(item["alpha"])
    spans = []
    for position, (token, alpha) in enumerate(zip(tokens, item["alpha"], strict=False), 1):
        ratio = alpha * length
        tip = f"token {position} of {length} · alpha {alpha:.4f} · {ratio:.1f}× uniform"
        spans.append(
            token_span(
                token,
                "good" if item["weight"] >= 0 else "bad",
                (min(ratio, FULL_SHADE) / FULL_SHADE) ** SHADE_POWER,
                tip,
            )
        )
    label = f'<p class="what">{visible(item["criterion"])}</p><p class="fine">{_verdict(item)}</p>'
    return strip(label, spans, "item")


def strip(label: str, spans: list[str], kind: str) -> str:
    """HTML: ``label`` (HTML), and beside it the first ``MAX_TOKENS`` of ``spans`` (HTML of ``token_span``)."""
    more = f'<span class="more"> … {len(spans) - MAX_TOKENS} more tokens</span>' if len(spans) > MAX_TOKENS else ""
    return f'<div class="strip {kind}"><div class="label">{label}</div><p class="text">{"".join(spans[:MAX_TOKENS])}{more}</p></div>'


def token_span(token: str, kind: str, shade: float, tip: str) -> str:
    """HTML: ``token`` (any text) in the colour of ``kind`` ("good" or "bad"). ``shade``: in [0, 1]. ``tip``: text at the pointer."""
    text = visible(token).replace("\n", "⏎\n")
    return f'<span class="{kind}" style="--v:{shade:.2f}" data-tip="{escape(tip)}">{text}</span>'


def _verdict(item: dict) -> str:
    if item["verdict"] is None:
        return f"score {item['score']:+.3f}"
    verdict = "True" if item["verdict"] else "False"
    agrees = ""
    if item["truth"] is not None:
        agrees = " · correct" if item["truth"] == item["verdict"] else ' · <b class="wrong">wrong</b>'
    p_true = "" if item["p_true"] is None else f", p(True) {item['p_true']:.2f}"
    return f'<b class="{"good" if item["weight"] >= 0 else "bad"}">{item["weight"]:+g}</b> · {verdict}{p_true}{agrees}'


def _unattributed(items: list[dict]) -> str:
    """HTML: a list of the items that had no backward pass. Empty if there are none."""
    if not items:
        return ""
    rows = "".join(
        f"<li>{visible(item['criterion'])} <span class='fine'>{_verdict(item)}</span></li>" for item in items
    )
    return f'<div class="rest"><p class="fine">No attribution (judged False or below the group, or nothing to tell the group apart):</p><ul>{rows}</ul></div>'
