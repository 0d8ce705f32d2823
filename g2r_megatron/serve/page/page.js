// The page of g2r serve: asks /v1/credit and /v1/hide, and draws the answers. Every text goes in by textContent.
"use strict";

const EXAMPLES = [
  {
    name: "Choose ...", prompt: "", response: "",
    rubric: [["", 1]],
  },
  {
    name: "A tired patient",
    prompt: "room spins, always tired. takes tylenol. allergic to coumadin.",
    response: "complains of vertigo. try slow turns. continue warfarin. file updated.",
    rubric: [["acknowledges vertigo", 3], ["advises slow turns", 5], ["prescribes warfarin", -5]],
  },
  {
    name: "Fever",
    prompt: "I have had a fever since yesterday. What helps?",
    response: "Rest and drink water. Most fevers pass within three days. See a doctor if yours lasts longer. You can also buy our herbal cure.",
    rubric: [["Advises rest", 1], ["Says when to see a doctor", 3], ["Sells something", -2]],
  },
];
// Control and direction characters, which could disguise a text, are drawn as this.
const INVISIBLE = /[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u200b-\u200f\u202a-\u202e\u2060-\u2069\ufeff]/g;
const FULL_SHADE = 6; // times the even share: darkest shade
const MARK = "\u2423";

const byId = (id) => document.getElementById(id);
const visible = (text) => text.replace(INVISIBLE, MARK);
let shown = null; // {request, answer, characters, view, hidden: Set}
let asked = 0; // the last question counts: earlier answers that come later are dropped

function element(name, text, options = {}) {
  const made = document.createElement(name);
  if (text !== undefined) made.textContent = text;
  for (const [key, value] of Object.entries(options)) made.setAttribute(key, value);
  return made;
}

// ---- asking ------------------------------------------------------------------------------------------------------

async function ask(path, body) {
  const headers = { "Content-Type": "application/json" };
  const key = byId("key").value.trim();
  if (key) headers.Authorization = `Bearer ${key}`;
  const options = body === undefined ? { headers } : { method: "POST", headers, body: JSON.stringify(body) };
  const response = await fetch(path, options);
  const answer = await response.json();
  if (!response.ok) throw new Error(answer.error || `status ${response.status}`);
  return answer;
}

async function guarded(work) {
  byId("problem").textContent = "";
  try {
    await work();
  } catch (error) {
    byId("problem").textContent = visible(String(error.message));
  }
}

async function showModel() {
  const model = (await ask("v1/models")).data[0];
  byId("model").textContent = visible(`${model.model}: inputs up to ${model.max_length} tokens, ${model.ranks} rank(s)`);
  const chosen = byId("attribution").value;
  byId("attribution").replaceChildren(...model.attributions.map((name) => element("option", name, { value: name })));
  if (model.attributions.includes(chosen)) byId("attribution").value = chosen;
  byId("rubric").hidden = model.is_reward_model;
  byId("rubric").disabled = model.is_reward_model;
}

function requestOfForm() {
  const rubric = [...byId("criteria").children]
    .map((row) => ({ criterion: row.querySelector(".criterion").value, weight: Number(row.querySelector(".weight").value) }))
    .filter((item) => item.criterion.trim());
  return { prompt: byId("prompt").value, rubric: byId("rubric").disabled ? [] : rubric };
}

async function judge() {
  const number = ++asked;
  const request = requestOfForm();
  const text = byId("response").value;
  const attribution = byId("attribution").value;
  byId("judge").disabled = true;
  try {
    if (!attribution) await showModel();
    const options = attribution ? { attribution } : {};
    const answer = await ask("v1/credit", { ...request, responses: [{ text }], options });
    if (number !== asked) return;
    shown = { request, text, answer: answer.responses[0], characters: [...text], view: "all", hidden: new Set(), margins: null };
    draw();
  } finally {
    byId("judge").disabled = false;
  }
}

async function hide(sentence) {
  const now = shown;
  if (now.hidden.has(sentence)) now.hidden.delete(sentence);
  else now.hidden.add(sentence);
  draw();
  byId("text").querySelector(`[data-sentence="${sentence}"]`).focus();
  if (!now.hidden.size) return;
  const sentences = [...now.hidden].sort((a, b) => a - b);
  const answer = await ask("v1/hide", { ...now.request, response: { text: now.text }, sentences });
  if (now !== shown) return;
  now.margins = answer;
  now.asked = sentences;
  draw();
  byId("text").querySelector(`[data-sentence="${sentence}"]`).focus();
}

// ---- drawing -----------------------------------------------------------------------------------------------------

function draw() {
  byId("result").hidden = false;
  byId("score").textContent = `score ${format(shown.answer.reward)}`;
  drawVerdicts();
  drawText();
  byId("unhide").disabled = !shown.hidden.size;
}

function format(number) {
  return number === null || number === undefined ? "-" : number.toFixed(3);
}

function drawVerdicts() {
  const items = shown.answer.items.length ? shown.answer.items : [{ criterion: "score of the reward model", alpha: shown.answer.alpha }];
  const rows = [verdictRow("all", "all criteria by their weights", {}, null)];
  items.forEach((item, i) => rows.push(verdictRow(String(i), item.criterion, item, i)));
  byId("verdicts").replaceChildren(...rows);
}

function verdictRow(value, name, item, i) {
  const row = element("tr");
  const radio = element("input", undefined, { type: "radio", name: "view", value, id: `view-${value}` });
  radio.checked = shown.view === value;
  radio.addEventListener("change", () => { shown.view = value; drawText(); });
  const show = element("td");
  show.append(radio);
  const title = element("td");
  title.append(element("label", visible(name), { for: `view-${value}` }));
  const probability = element("td");
  if (item.p_true !== undefined) {
    const meter = element("meter", undefined, { min: "0", max: "1", "aria-label": "p(True)" });
    meter.value = item.p_true;
    probability.append(meter, element("span", ` ${format(item.p_true)} ${item.verdict ? "True" : "False"}`));
  }
  const weight = item.weight === undefined ? "" : String(item.weight);
  row.append(show, title, element("td", weight), probability, ...marginCells(i));
  return row;
}

function marginCells(i) {
  if (i === null || !shown.margins || !shown.hidden.size) return [element("td", ""), element("td", "")];
  const whole = shown.margins.margins[i];
  const parts = shown.asked.map((sentence, n) => `sentence ${sentence + 1}: ${format(shown.margins.hidden[i][n])}`);
  return [element("td", format(whole)), element("td", parts.join(", "))];
}

function credits() {
  // One number a token, 1 for the even share of all that is given.
  const { answer, view } = shown;
  if (view === "all") {
    const size = answer.token_rewards.reduce((sum, r) => sum + Math.abs(r), 0) || 1;
    return answer.token_rewards.map((r) => (r * answer.token_rewards.length) / size);
  }
  const item = answer.items.length ? answer.items[Number(view)] : answer;
  const sign = item.weight < 0 ? -1 : 1;
  return answer.spans.map((_, t) => (item.alpha ? sign * item.alpha[t] * item.alpha.length : 0));
}

function drawText() {
  const { answer, characters } = shown;
  const values = credits();
  const drawn = answer.sentences.map(([first, last], number) => {
    const sentence = element("span", undefined, {
      class: "sentence", role: "button", tabindex: "0", "data-sentence": String(number),
      "aria-pressed": String(shown.hidden.has(number)),
    });
    for (let t = first; t < last; t++) sentence.append(token(answer.spans, t, characters, values[t]));
    sentence.addEventListener("click", () => guarded(() => hide(number)));
    sentence.addEventListener("keydown", (event) => {
      if (event.key !== "Enter" && event.key !== " ") return;
      event.preventDefault();
      guarded(() => hide(number));
    });
    return sentence;
  });
  byId("text").replaceChildren(...drawn);
}

function token(spans, t, characters, value) {
  // A character of several tokens is drawn with the first; what no token has goes with the one before.
  const start = t === 0 ? 0 : Math.max(spans[t][0], spans[t - 1][1]);
  const end = t + 1 < spans.length ? Math.max(spans[t][1], start) : characters.length;
  const made = element("span", visible(characters.slice(start, end).join("")), { title: format(value) });
  const shade = Math.min(Math.sqrt(Math.abs(value) / FULL_SHADE), 1) * 0.75;
  made.style.backgroundColor = value < 0 ? `rgba(222, 122, 20, ${shade})` : `rgba(40, 120, 210, ${shade})`;
  return made;
}

// ---- the form ----------------------------------------------------------------------------------------------------

function criterionRow(text, weight) {
  const row = element("li");
  const input = element("input", undefined, { class: "criterion", "aria-label": "criterion" });
  input.value = text;
  const number = element("input", undefined, { class: "weight", type: "number", step: "any", "aria-label": "weight" });
  number.value = String(weight);
  const remove = element("button", "\u00d7", { type: "button", "aria-label": "remove the criterion" });
  remove.addEventListener("click", () => { row.remove(); byId("add").focus(); });
  row.append(input, number, remove);
  return row;
}

function fill(example) {
  byId("prompt").value = example.prompt;
  byId("response").value = example.response;
  byId("criteria").replaceChildren(...example.rubric.map(([text, weight]) => criterionRow(text, weight)));
}

byId("example").append(...EXAMPLES.map((example, i) => element("option", example.name, { value: String(i) })));
byId("example").addEventListener("change", () => fill(EXAMPLES[Number(byId("example").value)]));
byId("add").addEventListener("click", () => {
  byId("criteria").append(criterionRow("", 1));
  byId("criteria").lastElementChild.querySelector(".criterion").focus();
});
byId("form").addEventListener("submit", (event) => {
  event.preventDefault();
  guarded(judge);
});
byId("attribution").addEventListener("change", () => { if (shown) guarded(judge); });
byId("key").addEventListener("change", () => guarded(showModel));
byId("unhide").addEventListener("click", () => { shown.hidden.clear(); draw(); });
fill(EXAMPLES[0]);
guarded(showModel);
