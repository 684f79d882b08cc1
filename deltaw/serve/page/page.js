// The page: choose models, type one prompt, see the answers stream side by side.

import { differing } from "./difference.js";
import { answer, card, models } from "./stream.js";

const SHOWN = 200;
const $ = (id) => document.getElementById(id);
const chosen = new Set();
const blend = new Map();
const cards = new Map();
let known = [], base = null, running = null;

function make(tag, properties = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}

function fail(text) {
  $("fault").textContent = text;
  $("fault").hidden = !text;
}

// ------------------------------------------------------------------------------------------------------- models

async function connect() {
  try {
    known = await models($("key").value);
  } catch (error) {
    $("base").textContent = "Not connected";
    fail(`The server's models cannot be listed: ${error.message}`);
    return;
  }
  fail("");
  base = known.find((model) => !model.parent) ?? known[0];
  const adapters = known.filter((model) => model !== base);
  $("base").textContent = `${base.id}, ${adapters.length} adapter${adapters.length === 1 ? "" : "s"}`;
  if (base.chat === false) $("base").textContent += "; it has no chat template: prompts are continued as text";
  limitTokens();
  if (!chosen.size) [base, ...adapters.slice(0, 1)].forEach((model) => chosen.add(model.id));
  $("blend-with").replaceChildren(...adapters.map((model) => make("option", { value: model.id, textContent: model.id })));
  $("blend-add").disabled = !adapters.length;
  listModels();
}

/** No longer answer can be asked for than the server allows, which says so with the base. */
function limitTokens() {
  const field = $("max_tokens"), most = base.max_tokens ?? Number(field.max);
  field.max = String(most);
  field.value = String(Math.min(Number(field.value), most));
}

function listModels() {
  const wanted = $("filter").value.toLowerCase();
  const found = known.filter((model) => model === base || model.id.toLowerCase().includes(wanted));
  $("models").replaceChildren(...found.slice(0, SHOWN).map(entry));
  $("more").hidden = found.length <= SHOWN;
  $("more").textContent = `${found.length - SHOWN} more: filter by name`;
}

function entry(model, number) {
  const box = make("input", { type: "checkbox", id: `model-${number}`, checked: chosen.has(model.id) });
  box.addEventListener("change", () => (box.checked ? chosen.add(model.id) : chosen.delete(model.id)));
  const facts = make("dl");
  tell(facts, model);
  return make("li", { className: "model" }, box, make("label", { htmlFor: box.id, textContent: model.id }), facts);
}

async function tell(list, model) {
  if (model !== base && !cards.has(model.id)) cards.set(model.id, await card(model.id, $("key").value));
  for (const [name, value] of factsOf(model)) list.append(make("dt", { textContent: name }), make("dd", { textContent: value }));
}

function factsOf(model) {
  if (model === base) return [["base", "as it is"]];
  const facts = cards.get(model.id), found = [];
  if (facts.rank) found.push(["rank", String(facts.rank)]);
  if (facts.targets?.length) found.push(["changes", shortened(facts.targets)]);
  if (facts.bytes) found.push(["size", facts.bytes < 2 ** 20 ? `${(facts.bytes / 2 ** 10).toFixed(1)} KiB` : `${(facts.bytes / 2 ** 20).toFixed(1)} MiB`]);
  if (facts.base) found.push(["base", facts.base]);
  if (facts.created) found.push(["saved", new Date(1000 * facts.created).toLocaleDateString()]);
  for (const [name, value] of Object.entries(facts.training?.after ?? {})) {
    const before = facts.training.before?.[name];
    found.push([name, (before === undefined ? "" : `${Number(before).toPrecision(3)} → `) + Number(value).toPrecision(3)]);
  }
  return found;
}

/** The kinds of layers among full names of sites: what the last part of each name says. */
function shortened(targets) {
  return [...new Set(targets.map((name) => name.split(".").pop()))].join(", ");
}

// -------------------------------------------------------------------------------------------------------- blend

function listSliders() {
  $("sliders").replaceChildren(...[...blend].map(([id, scale], number) => {
    const out = make("output", { textContent: scale.toFixed(2) });
    const range = make("input", { type: "range", min: "-1", max: "2", step: "0.05", value: String(scale), id: `scale-${number}` });
    range.addEventListener("input", () => {
      blend.set(id, Number(range.value));
      out.textContent = Number(range.value).toFixed(2);
    });
    const remove = make("button", { type: "button", textContent: "×", ariaLabel: `Remove ${id} from the blend` });
    remove.addEventListener("click", () => { blend.delete(id); listSliders(); $("blend-with").focus(); });
    return make("div", { className: "slider" }, make("label", { htmlFor: range.id, textContent: id }), range, out, remove);
  }));
}

function addToBlend() {
  const id = $("blend-with").value;
  if (id && !blend.has(id)) blend.set(id, blend.size ? 0.5 : 1);
  listSliders();
}

// ------------------------------------------------------------------------------------------------------ answers

function requests() {
  const messages = [{ role: "user", content: $("prompt").value }];
  if ($("system").value) messages.unshift({ role: "system", content: $("system").value });
  const shared = { messages, max_tokens: Number($("max_tokens").value), temperature: Number($("temperature").value),
                   top_p: Number($("top_p").value), seed: Number($("seed").value) };
  const asked = known.filter((model) => chosen.has(model.id)).map((model) => ({ name: model.id, request: { ...shared, model: model.id } }));
  if (blend.size) {
    const name = [...blend].map(([id, scale]) => `${scale} × ${id}`).join(" + ");
    const lora = [...blend].map(([id, scale]) => ({ id, scale }));
    asked.push({ name, request: { ...shared, model: base.id, lora } });
  }
  return asked;
}

function column(name) {
  const text = make("div", { className: "text" }), figures = make("p", { className: "figures note" });
  const element = make("article", { className: "answer busy" }, make("h2", { textContent: name }), text, figures);
  element.setAttribute("aria-busy", "true");
  element.setAttribute("aria-label", `Answer of ${name}`);
  return { name, element, text, figures, tokens: [], unseen: 0, count: 0, first: null, began: performance.now() };
}

async function fill(one, request, signal) {
  try {
    for await (const piece of answer(request, base.chat !== false, $("key").value, signal)) {
      if ((piece.text || piece.tokens.length) && one.first === null) one.first = performance.now();
      one.count = piece.usage?.completion_tokens ?? one.count;
      draw(one, piece);
    }
  } catch (error) {
    if (error.name !== "AbortError") {
      one.element.classList.add("failed");
      one.text.textContent = error.message;
    }
  }
  one.element.classList.remove("busy");
  one.element.setAttribute("aria-busy", "false");
  measure(one, performance.now());
}

/** Add a piece: token by token where their texts make up the piece's, else as one (a character of several tokens). */
function draw(one, { text, tokens }) {
  if (text) {
    const each = tokens.map((t) => t.token).join("") === text;
    const logprob = tokens.reduce((sum, t) => sum + t.logprob, one.unseen);
    const shown = each ? tokens : [{ token: text, logprob }];
    one.tokens.push(...shown);
    one.text.append(...shown.map(tokenOf));
    one.unseen = 0;
  } else {
    one.unseen += tokens.reduce((sum, t) => sum + t.logprob, 0);
  }
  measure(one, performance.now());
}

function tokenOf({ token, logprob }) {
  const chance = `${(100 * Math.exp(logprob)).toPrecision(3)} %`;
  return make("span", { className: "token", textContent: token, title: `${JSON.stringify(token)}: ${chance}` });
}

function measure(one, now) {
  const tokens = one.count || one.tokens.length;
  if (one.first === null) return;
  const seconds = (now - one.first) / 1000, wait = Math.round(one.first - one.began);
  const speed = tokens > 1 && seconds > 0 ? `${((tokens - 1) / seconds).toFixed(1)} tokens/s, ` : "";
  one.figures.textContent = `${tokens} tokens, ${speed}first after ${wait} ms`;
}

function mark(columns) {
  const on = $("colour").checked && columns.length > 1;
  $("legend").hidden = !on;
  const reference = columns[0]?.tokens.map((t) => t.token) ?? [];
  for (const one of columns.slice(1)) {
    const differs = differing(reference, one.tokens.map((t) => t.token));
    [...one.text.children].forEach((span, n) => {
      const marked = on && differs[n];
      span.className = marked ? `token differs ${one.tokens[n].logprob > Math.log(0.5) ? "sure" : "unsure"}` : "token";
      if (marked) span.tabIndex = 0; else span.removeAttribute("tabindex");
    });
  }
}

async function run(event) {
  event?.preventDefault();
  if (running || !$("prompt").value.trim()) return;
  const asked = requests();
  if (!asked.length) return fail("Choose at least one model on the left.");
  fail("");
  running = new AbortController();
  $("run").disabled = true;
  $("stop").disabled = false;
  const columns = asked.map((one) => column(one.name));
  $("answers").replaceChildren(...columns.map((one) => one.element));
  shown = columns;
  await Promise.all(columns.map((one, n) => fill(one, asked[n].request, running.signal)));
  mark(columns);
  $("done").textContent = `${columns.length} answers are finished`;
  running = null;
  $("run").disabled = false;
  $("stop").disabled = true;
}

let shown = [];
$("ask").addEventListener("submit", run);
$("stop").addEventListener("click", () => running?.abort());
$("filter").addEventListener("input", listModels);
$("key").addEventListener("change", connect);
$("blend-add").addEventListener("click", addToBlend);
$("colour").addEventListener("change", () => mark(shown));
document.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) run(event);
  if (event.key === "Escape") running?.abort();
});
connect();
