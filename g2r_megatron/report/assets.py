"""Style sheet and script of report.html. The page contains them, so that it needs no other file."""

CSS = """
:root {
  color-scheme: light dark;
  --paper: light-dark(#fcfbf8, #15171a); --raised: light-dark(#ffffff, #1c1f23);
  --ink: light-dark(#1d2126, #e7e5df); --soft: light-dark(#5b626b, #a3a8ae); --faint: light-dark(#8b919a, #767c84);
  --rule: light-dark(#e4e1d9, #2d3136); --good: light-dark(#12a07f, #1fa583); --bad: light-dark(#e0633a, #cf5f3a);
  --warn: light-dark(#a8540a, #f0a95c);
  --mono: ui-monospace, "SF Mono", "Cascadia Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace;
}
.c0 { --c: light-dark(#2a6fbb, #6db0f2); } .c1 { --c: light-dark(#d97f12, #f0a848); }
.c2 { --c: light-dark(#0a8f6c, #3ccb9f); } .c3 { --c: light-dark(#a8428f, #dd8cc8); }
.c4 { --c: light-dark(#6a6f2b, #bfc56a); } .c5 { --c: light-dark(#5d5fc0, #a3a5f5); }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 15px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif; }
main { max-width: 1120px; margin: 0 auto; padding: 8px 28px 80px; }
h1 { font-size: 30px; line-height: 1.2; letter-spacing: -.02em; margin: 34px 0 8px; font-weight: 680; max-width: 26em; text-wrap: balance; } .whole { white-space: nowrap; }
h2 { font-size: 20px; letter-spacing: -.01em; margin: 46px 0 6px; padding-top: 18px; border-top: 1px solid var(--rule); font-weight: 660; }
.lede, .note { color: var(--soft); max-width: 46em; margin: 0 0 18px; } .lede { font-size: 16px; }
.fine { color: var(--soft); font-size: 13px; } .wrong { color: var(--bad); font-weight: 600; }
nav { position: sticky; top: 0; z-index: 5; background: color-mix(in srgb, var(--paper) 92%, transparent); backdrop-filter: blur(8px); border-bottom: 1px solid var(--rule); }
nav div { max-width: 1120px; margin: 0 auto; padding: 9px 28px; display: flex; gap: 8px; align-items: center; flex-wrap: wrap; }
nav b { margin-right: 10px; font-size: 14px; } nav .end { margin-left: auto; }
button { font: inherit; font-size: 13px; color: inherit; background: none; border: 1px solid var(--rule); border-radius: 99px; padding: 3px 12px; cursor: pointer; }
button:hover { border-color: var(--faint); } button[aria-pressed=false] { opacity: .4; text-decoration: line-through; }
:focus-visible { outline: 2px solid var(--c, var(--ink)); outline-offset: 2px; }
td .swatch, th .swatch { overflow-wrap: anywhere; } .swatch::before { content: ""; display: inline-block; width: 14px; height: 4px; border-radius: 2px; background: var(--c); margin-right: 8px; vertical-align: 3px; }
.swatch.again::before { background: repeating-linear-gradient(90deg, var(--c) 0 4px, transparent 4px 6px); }
.chip { color: var(--c); font-weight: 660; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th { text-align: right; font-weight: 600; font-size: 13px; color: var(--soft); vertical-align: bottom; padding: 6px 12px; border-bottom: 1px solid var(--faint); }
td { text-align: right; padding: 9px 12px; border-bottom: 1px solid var(--rule); white-space: nowrap; vertical-align: top; }
th:first-child, td:first-child { text-align: left; padding-left: 0; white-space: normal; }
td small { display: block; color: var(--soft); font-size: 12px; line-height: 1.35; }
tr.run td { padding-top: 4px; padding-bottom: 4px; font-size: 13px; color: var(--soft); } tr.run td:first-child { padding-left: 22px; }
tr.group td { font-size: 16px; } tr.group td:first-child { font-weight: 640; }
td.dumbbell { width: 210px; padding-top: 11px; } td.dumbbell svg { display: block; width: 190px; height: 16px; margin-left: auto; }
td.flag { color: var(--warn); font-weight: 640; } td.flag::before { content: "▲ "; font-size: 10px; vertical-align: 1px; }
.health td:first-child { min-width: 270px; } .health td { padding-top: 6px; padding-bottom: 6px; }
.charts { display: flex; flex-wrap: wrap; justify-content: space-between; gap: 22px 24px; margin: 16px 0; }
figure.chart { margin: 0; flex: 0 1 var(--w); min-width: 0; width: var(--w); max-width: 100%; }
figcaption { font-size: 13.5px; font-weight: 620; margin-bottom: 4px; }
figure svg { display: block; width: 100%; height: auto; overflow: visible; }
svg text { font-size: 11px; fill: var(--soft); font-variant-numeric: tabular-nums; }
svg .axis { fill: var(--faint); } svg .grid { stroke: var(--rule); } svg .zero { stroke: var(--faint); }
svg .mark { stroke: var(--faint); stroke-dasharray: 2 4; } svg .marktext { fill: var(--faint); }
svg .line { fill: none; stroke: var(--c); stroke-width: 2; stroke-linejoin: round; stroke-linecap: round; } svg .again .line { stroke-dasharray: 6 4; }
svg .band { fill: var(--c); opacity: .14; } svg .dot { fill: var(--paper); stroke: var(--c); stroke-width: 2; }
svg .alarm { fill: var(--warn); stroke: var(--paper); stroke-width: 1; } svg .alarmtext { fill: var(--warn); font-weight: 640; paint-order: stroke; stroke: var(--paper); stroke-width: 3px; }
svg .end { fill: var(--c); font-weight: 640; font-size: 12.5px; }
svg .hair { stroke: var(--faint); visibility: hidden; }
#tip { position: fixed; z-index: 9; pointer-events: none; display: none; background: var(--raised); color: var(--ink); border: 1px solid var(--rule); border-radius: 7px; padding: 7px 11px; font-size: 12.5px; line-height: 1.5; box-shadow: 0 6px 22px rgb(0 0 0 / .16); max-width: 340px; font-variant-numeric: tabular-nums; }
.bars { display: grid; grid-template-columns: minmax(0, max-content) minmax(0, 1fr) max-content; gap: 10px 16px; align-items: center; margin: 16px 0; }
.bars .bar { display: flex; height: 24px; gap: 2px; } .bars .bar span { border-radius: 3px; min-width: 1px; flex: 0 1 auto; overflow: hidden; font-size: 12px; line-height: 24px; padding-left: 6px; white-space: nowrap; }
.sample_phase { background: color-mix(in srgb, var(--ink) 16%, transparent); } .judge_phase { background: color-mix(in srgb, var(--good) 62%, var(--paper)); }
.update_phase { background: color-mix(in srgb, var(--ink) 34%, transparent); } .other_phase { background: color-mix(in srgb, var(--ink) 7%, transparent); }
.key { display: inline-block; width: 12px; height: 12px; border-radius: 3px; margin: 0 6px 0 14px; vertical-align: -1px; }
details.sample { border-top: 1px solid var(--rule); padding: 12px 0; } summary { cursor: pointer; overflow-wrap: anywhere; }
.prompt { margin: 12px 0 6px; max-width: 60em; } .prompt p { margin: 2px 0 0; white-space: pre-wrap; overflow-wrap: anywhere; color: var(--soft); max-height: 9.3em; overflow: auto; }
.strip { display: grid; grid-template-columns: 250px minmax(0, 1fr); gap: 24px; padding: 11px 0; border-top: 1px solid var(--rule); }
.strip .label p { margin: 0; } .strip .what { font-weight: 600; font-size: 14px; line-height: 1.35; overflow-wrap: anywhere; }
.strip .text { margin: 0; white-space: pre-wrap; overflow-wrap: anywhere; line-height: 1.95; font-size: 14.5px; max-height: 24em; overflow: auto; unicode-bidi: plaintext; }
.strip .text span { unicode-bidi: isolate; border-radius: 3px; padding: 2px 0; }
.text .good, .scale .good { background: color-mix(in oklab, var(--good) calc(var(--v) * 72%), transparent); } .text .bad, .scale .bad { background: color-mix(in oklab, var(--bad) calc(var(--v) * 72%), transparent); }
.text span[data-tip]:hover { outline: 1.5px solid var(--ink); } b.good { color: var(--good); } b.bad { color: var(--bad); } .more { color: var(--faint); }
.scale { display: inline-flex; gap: 2px; margin: 0 8px; vertical-align: -2px; } .scale span { width: 20px; height: 14px; border-radius: 3px; outline: 1px solid var(--rule); outline-offset: -1px; }
.rest { border-top: 1px solid var(--rule); padding: 8px 0; } .rest p { margin: 0; } .rest ul { margin: 4px 0 0; padding-left: 18px; columns: 2 320px; column-gap: 40px; font-size: 14px; } .rest li { break-inside: avoid; overflow-wrap: anywhere; }
.credited ul { margin: 0; padding-left: 18px; font-size: 14.5px; overflow-wrap: anywhere; } .credited p { margin: 6px 0 0; font-size: 13.5px; line-height: 2; }
.credited .fine { font-size: 13px; } .credited .fine:first-child, .credited > p:first-child { margin: 0; line-height: 1.5; }
.word { background: color-mix(in oklab, var(--good) 16%, transparent); border-radius: 4px; padding: 1px 7px; margin-right: 4px; white-space: nowrap; } .word small { color: var(--soft); }
.pairs { display: grid; grid-template-columns: minmax(0, 1fr) minmax(0, 1fr); gap: 6px 32px; margin-top: 10px; } .pairs h3 { grid-column: 1 / -1; font-size: 15px; margin: 14px 0 0; border-top: 1px solid var(--rule); padding-top: 12px; }
.pairs p { margin: 0; white-space: pre-wrap; overflow-wrap: anywhere; max-height: 15em; overflow: auto; unicode-bidi: plaintext; } .pairs .fine { white-space: normal; margin-bottom: 4px; }
pre { font: 12.5px/1.5 var(--mono); overflow-x: auto; background: var(--raised); border: 1px solid var(--rule); border-radius: 7px; padding: 14px; }
@media (max-width: 760px) {
  main, nav div { padding-left: 16px; padding-right: 16px; } .strip, .pairs { grid-template-columns: minmax(0, 1fr); gap: 6px; }
  h1 { font-size: 24px; overflow-wrap: anywhere; } .whole { white-space: normal; } td.dumbbell, th.dumbbell { display: none; }
  td:first-child, .health td:first-child { min-width: 112px; } th, td { padding-left: 8px; padding-right: 8px; }
  figure.chart { overflow-x: auto; } figure svg { min-width: min(var(--w), 480px); }
  .bars { grid-template-columns: minmax(0, 1fr) max-content; } .bars .swatch { grid-column: 1 / -1; }
}
@media print { nav { position: static; } .prompt p, .strip .text, .pairs p { max-height: none; } }
"""

SCRIPT = """
'use strict';
const tip = document.getElementById('tip');
function showTip(event, lines) {
  tip.replaceChildren(...lines.map(([text, cls]) => {
    const row = document.createElement('div');
    row.textContent = text;
    row.className = cls;
    return row;
  }));
  tip.style.display = 'block';
  const box = tip.getBoundingClientRect();
  const x = event.clientX + 16 + box.width > innerWidth ? event.clientX - 16 - box.width : event.clientX + 16;
  const y = Math.min(event.clientY + 14, innerHeight - box.height - 8);
  tip.style.left = Math.max(4, x) + 'px';
  tip.style.top = y + 'px';
}
function hideTip() { tip.style.display = 'none'; }

document.addEventListener('pointerover', event => {
  const target = event.target.closest('[data-tip]');
  if (target) showTip(event, [[target.dataset.tip, '']]);
});
document.addEventListener('pointerout', event => { if (event.target.closest('[data-tip]')) hideTip(); });

const hidden = new Set();
for (const svg of document.querySelectorAll('svg[data-chart]')) {
  const chart = JSON.parse(svg.dataset.chart);
  const hair = svg.querySelector('.hair');
  svg.addEventListener('pointermove', event => {
    const box = svg.getBoundingClientRect();
    const px = (event.clientX - box.left) / box.width * chart.width;
    const wanted = chart.x0 + (px - chart.left) / (chart.right - chart.left) * (chart.x1 - chart.x0);
    const nearest = xs => xs.reduce((best, x, i) => Math.abs(x - wanted) < Math.abs(xs[best] - wanted) ? i : best, 0);
    const lines = chart.lines.filter(line => !hidden.has(String(line.slot)));
    const at = lines.map(line => line.x[nearest(line.x)]);
    const joined = at.filter((_, i) => !lines[i].dots);
    if (!joined.length) return;
    const x = joined[nearest(joined)];
    const shown = chart.names.length ? chart.names[x] : Math.round(x * 10) / 10;
    const rows = lines.map((line, i) => [line.label + ': ' + line.text[line.x.indexOf(at[i])], 'swatch ' + line.class])
      .filter((_, i) => !lines[i].dots || at[i] === x);
    showTip(event, [[chart.x + ' ' + shown, 'fine'], ...rows]);
    const hx = chart.left + (x - chart.x0) / (chart.x1 - chart.x0) * (chart.right - chart.left);
    hair.setAttribute('x1', hx);
    hair.setAttribute('x2', hx);
    hair.style.visibility = 'visible';
  });
  svg.addEventListener('pointerleave', () => { hair.style.visibility = 'hidden'; hideTip(); });
}

for (const button of document.querySelectorAll('button[data-toggle]')) {
  button.addEventListener('click', () => {
    const slot = button.dataset.toggle;
    hidden.has(slot) ? hidden.delete(slot) : hidden.add(slot);
    button.setAttribute('aria-pressed', String(!hidden.has(slot)));
    for (const part of document.querySelectorAll(`svg [data-slot="${slot}"]`)) part.style.display = hidden.has(slot) ? 'none' : '';
  });
}

const theme = document.getElementById('theme');
theme.hidden = false;
theme.addEventListener('click', () => {
  const root = document.documentElement;
  const dark = (root.style.colorScheme || (matchMedia('(prefers-color-scheme: dark)').matches ? 'dark' : 'light')) === 'dark';
  root.style.colorScheme = dark ? 'light' : 'dark';
});
"""

# Style sheet of a figure in its own file: fixed colours on white, and only what programs other than browsers support.
FIGURE_CSS = """
text { font-size: 11px; fill: #5b626b; } .title { font-size: 13px; font-weight: bold; fill: #1d2126; }
.axis, .marktext { fill: #8b919a; } .grid { stroke: #e4e1d9; } .zero { stroke: #8b919a; } .mark { stroke: #8b919a; stroke-dasharray: 2 4; }
.line { fill: none; stroke-width: 2; stroke-linejoin: round; stroke-linecap: round; } .again .line { stroke-dasharray: 6 4; }
.band { opacity: 0.14; } .dot { fill: #ffffff; stroke-width: 2; } .end { font-size: 12.5px; font-weight: bold; }
.alarm { fill: #a8540a; stroke: #ffffff; } .alarmtext { fill: #a8540a; font-weight: bold; paint-order: stroke; stroke: #ffffff; stroke-width: 3px; }
""" + "".join(
    f".c{slot} .line, .c{slot} .dot {{ stroke: {colour}; }} .c{slot} .band, .end.c{slot} {{ fill: {colour}; }}\n"
    for slot, colour in enumerate(("#2a6fbb", "#d97f12", "#0a8f6c", "#a8428f", "#6a6f2b", "#5d5fc0"))
)
