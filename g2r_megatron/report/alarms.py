"""The report's list of alarms: what each alarm means, and in which runs and steps it went on."""

from collections.abc import Sequence
from html import escape

from g2r_megatron.report.charts import slot_class
from g2r_megatron.report.runs import Group
from g2r_megatron.report.text import visible


def alarm_list(groups: Sequence[Group]) -> str:
    """HTML: one strip for each alarm, the earliest first, with its runs and steps; or a sentence that no alarm went on."""
    told: dict[str, list[tuple[dict, str]]] = {}
    for group in groups:
        for run in group.runs:
            for alarm in run.alarms:
                chip = f'<span class="chip {slot_class(group.slot)}">{escape(group.label)}</span>'
                place = f"{chip} seed {escape(run.seed)}: step {alarm['step']} ({_value(alarm)})"
                told.setdefault(str(alarm["alarm"]), []).append((alarm, place))
    by_step = sorted(told.values(), key=lambda own: min(alarm["step"] for alarm, _ in own))
    return "".join(_strip(own) for own in by_step) or "<p>No alarm went on.</p>"


def _strip(own: list[tuple[dict, str]]) -> str:
    alarm, _ = own[0]
    places = "".join(f"<li>{place}</li>" for _, place in own)
    return (
        f'<div class="strip"><div class="label"><p class="what">{visible(str(alarm["alarm"]))}</p>'
        f'<p class="fine">{visible(str(alarm["curve"]))}</p></div>'
        f'<div class="credited"><p>{visible(str(alarm["advice"]))}</p><ul class="fine">{places}</ul></div></div>'
    )


def _value(alarm: dict) -> str:
    return visible(f"{alarm['value']:.3g}, threshold {alarm['threshold']:g}")
