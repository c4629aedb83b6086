"use strict";
// Everything that comes from the server is put in as text, never as HTML.

const $ = (id) => document.getElementById(id);
const HIDDEN = /[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]/g;
const shown = (text) => String(text).replace(HIDDEN, (c) => "\\u" + c.charCodeAt(0).toString(16).padStart(4, "0"));

function el(tag, fields, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(fields || {})) {
    if (name === "class") made.className = value;
    else if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else if (value !== false && value != null) made.setAttribute(name, value === true ? "" : value);
  }
  for (const child of children.flat()) {
    if (child != null) made.append(child instanceof Node ? child : shown(child));
  }
  return made;
}

let state = {};
const token = { get: () => sessionStorage.getItem("errata-token") || "", set: (t) => sessionStorage.setItem("errata-token", t) };

function headers(more) {
  return token.get() ? { ...more, Authorization: `Bearer ${token.get()}` } : { ...more };
}

// What only looks is stopped by the button; what changes the model is always carried out.
let stopper = new AbortController();
const changes = (path) => /\/(apply|revert)$/.test(path);

async function send(path, body, again = true) {
  const post = body !== undefined;
  const answer = await fetch(path, {
    method: post ? "POST" : "GET",
    signal: post && !changes(path) ? stopper.signal : undefined,
    headers: headers(post ? { "Content-Type": "application/json" } : {}),
    body: post ? JSON.stringify(body) : undefined,
  });
  if (!answer.ok) {
    let message = `${answer.status} ${answer.statusText}`;
    try { message = (await answer.json()).error.message; } catch { /* no JSON: the status says it */ }
    if (answer.status !== 401 || !again) throw new Error(message);
    await login(message);
    return send(path, body, false);
  }
  return answer;
}
const ask = async (path, body) => (await send(path, body)).json();

function fail(error) {
  $("error").textContent = error.name === "AbortError" ? "Stopped." : shown(error.message || error);
  $("error").hidden = false;
}

// While something takes long: what the server is at, everybody's work included.
let waiting = 0, watched = null;
function watch() {
  watched ??= setInterval(async () => {
    if (!waiting) {
      clearInterval(watched);
      watched = null;
      $("working").hidden = true;
      return;
    }
    try {
      const now = await (await fetch("errata/working", { headers: headers() })).json();
      $("working-what").textContent = shown(atWork(now));
      $("working").hidden = !waiting || !(now.jobs.length || now.texts);
    } catch { /* the work itself says what is wrong */ }
  }, 1000);
}

function atWork({ jobs, texts }) {
  const lines = jobs.map((job) => {
    const left = job.done && job.total > job.done ? `, about ${Math.ceil(job.step_seconds / job.done * (job.total - job.done))} s left` : "";
    const at = job.total > 1 ? `: ${job.step}, ${job.done} of ${job.total}` : job.step ? `: ${job.step}` : "";
    return `${job.what}${at} (${Math.round(job.seconds)} s${left})`;
  });
  if (texts) lines.push(`${texts} text${texts === 1 ? "" : "s"} being written`);
  return lines.join("; ");
}

// Runs a form or a button: it is disabled meanwhile, errors are shown, the focus comes back.
async function busy(button, work) {
  $("error").hidden = true;
  const label = button.textContent;
  const focused = document.activeElement === button;
  button.disabled = true;
  button.textContent = `${label} …`;
  watch();
  waiting += 1;
  try { await work(); } catch (error) { fail(error); }
  waiting -= 1;
  button.textContent = label;
  button.disabled = false;
  if (focused && button.isConnected && document.activeElement === document.body) button.focus();
}

// -- dialogs -------------------------------------------------------------------------------------

function open(dialog) {
  dialog.returnValue = "";
  dialog.showModal();
  return new Promise((done) => dialog.addEventListener("close", () => done(dialog.returnValue === "yes"), { once: true }));
}

async function login(why) {
  const field = $("login").querySelector("input");
  $("login-why").textContent = shown(why);
  field.value = "";
  if (await open($("login"))) token.set(field.value.trim());
}

async function confirmed(what, edit) {
  const dialog = $("confirm"), label = $("confirm-token"), field = label.querySelector("input");
  $("confirm-what").textContent = `${what} this edit?`;
  $("confirm-edit").textContent = shown(`${edit.id}  ${edit.title}`);
  dialog.querySelector("button[value=yes]").textContent = what;
  label.hidden = Boolean(token.get());
  field.value = "";
  const yes = await open(dialog);
  if (yes && field.value.trim()) token.set(field.value.trim());
  return yes;
}

// -- edits ---------------------------------------------------------------------------------------

async function refresh() {
  state = await ask("errata/state");
  const count = state.active.length;
  $("state").textContent = shown(`${state.model}: ${count} active edit${count === 1 ? "" : "s"}, ${state.edits} in the ledger${state.allow_edits ? "" : "; read-only"}`);
  document.title = shown(`errata: ${state.model}`);
  $("chat").elements.plain.checked ||= !state.chat;
  const tokens = $("chat").elements.max_tokens;
  tokens.max = state.max_new_tokens;
  if (Number(tokens.value) > state.max_new_tokens) tokens.value = state.max_new_tokens;
}

async function list(offset = 0) {
  const found = await ask(`errata/edits?q=${encodeURIComponent($("query").value)}&offset=${offset}`);
  const rows = found.edits.map(row);
  if (offset) $("list").append(...rows);
  else $("list").replaceChildren(...rows);
  const there = $("list").children.length;
  $("total").textContent = found.total ? `${found.total} found` : "nothing found";
  $("more").hidden = there >= found.total;
  if (!offset && !$("query").value) {
    $("stacks").replaceChildren(
      el("option", { value: "active", label: "what is on the model" }), el("option", { value: "base", label: "no edit" }),
      ...found.edits.map((e) => el("option", { value: e.id, label: shown(e.title) })));
  }
}

function row(edit) {
  const percent = (x) => `${Math.round(100 * x)} %`;
  const facts = [
    el("span", { class: "mono" }, edit.id), edit.method,
    edit.takes_effect == null ? null : el("span", { class: edit.takes_effect < 1 ? "warn" : "" }, `takes effect ${percent(edit.takes_effect)}`),
    edit.perplexity_ratio == null ? null : `perplexity × ${edit.perplexity_ratio.toFixed(3)}`,
    edit.norm == null ? null : `norm ${edit.norm.toPrecision(2)}`,
    edit.conflicts.length ? el("span", { class: "warn" }, `conflicts with ${edit.conflicts.join(", ")}`) : null,
    new Date(edit.created).toLocaleString(),
  ].filter((x) => x != null).map((x) => (x instanceof Node ? x : el("span", {}, x)));
  const details = el("div", { hidden: true });
  const more = el("button", { type: "button", "aria-expanded": "false", onclick: () => busy(more, () => unfold(edit, details, more)) }, "Details");
  const change = state.allow_edits && el("button", {
    type: "button", onclick: () => busy(change, () => exchange(edit)),
  }, edit.active ? "Revert" : "Apply");
  const what = edit.stale ? "on, stale" : edit.active ? "on" : "off";
  return el("li", { class: edit.active ? "on" : "", "data-id": edit.id },
    el("div", { class: "row" }, el("span", { class: edit.stale ? "warn" : edit.active ? "good" : "prompt" }, what),
      el("span", { class: "title" }, edit.title), more, change || null),
    el("div", { class: "facts" }, facts),
    edit.warnings.map((text) => el("div", { class: "warn" }, text)), details);
}

async function exchange(edit) {
  const what = edit.active ? "Revert" : "Apply";
  if (!(await confirmed(what, edit))) return;
  try {
    await ask(`errata/edits/${edit.id}/${what.toLowerCase()}`, {});
  } finally {
    await refresh();
    await list();
  }
  document.querySelector(`[data-id="${edit.id}"] button:last-of-type`)?.focus();
}

async function unfold(edit, place, button) {
  if (!place.hidden) {
    place.hidden = true;
    button.setAttribute("aria-expanded", "false");
    return;
  }
  const found = await ask(`errata/edits/${edit.id}`);
  const said = Object.entries(found.config).filter(([, value]) => value != null)
    .map(([name, value]) => `${name} ${typeof value === "string" ? value : JSON.stringify(value)}`).join(", ");
  const pairs = [["config", said], ["stored as", `${found.kind}, ${found.bytes} bytes`],
    ["computed in", `${found.seconds.toFixed(2)} s`], ["made on top of", [found.on_top_of, ...found.parents].filter(Boolean).join(", ")], ["supersedes", found.supersedes.join(", ")],
    ["overlaps with", found.overlaps.join(", ")]].filter(([, value]) => value);
  const answers = el("div", {});
  const go = (view, fields) => {
    for (const [name, value] of Object.entries(fields)) $(view).elements[name].value = value;
    location.hash = view;
  };
  place.replaceChildren(
    el("dl", {}, pairs.flatMap(([name, value]) => [el("dt", {}, name), el("dd", {}, value)])),
    el("ul", { hidden: found.requests.length < 2 }, found.requests.map((r) => el("li", {}, `${r.prompt} → ${r.target}`))),
    el("div", { class: "row" },
      el("button", { type: "button", onclick: () => go("compare", { prompt: found.prompt, a: edit.active ? `-${edit.id}` : "active", b: edit.active ? "active" : edit.id }) }, "Compare without and with"),
      el("button", { type: "button", onclick: () => go("trace", { prompt: found.prompt, subject: found.subject }) }, "Trace")),
    answers);
  place.hidden = false;
  button.setAttribute("aria-expanded", "true");
  answers.append(el("p", { class: "note" }, "Asking the model …"));
  try {
    const report = await ask(`errata/edits/${edit.id}/answers`, {});
    const first = (text) => text.trim().split(/[.!?;](?=\s|$)|\n/)[0] || "(nothing)";
    const mark = (a) => a.about_fact
      ? (a.gives_target ? ["new answer", "good"] : a.gone ? ["gone", "good"]
        : [a.changed ? "changed" : "as before", a.as_asked ? "prompt" : "warn"])
      : (a.gives_target ? ["! new answer", "bad"] : a.changed ? ["! changed", "warn"] : ["as before", "prompt"]);
    answers.replaceChildren(
      el("h3", {}, "Before and after"),
      el("div", { class: "scroll" }, el("table", { class: "answers" },
        el("thead", {}, el("tr", {}, ["", "prompt", "without", "with", ""].map((x) => el("th", {}, x)))),
        el("tbody", {}, report.answers.map((a) => el("tr", {}, el("td", { class: "prompt" }, a.role), el("td", {}, a.prompt),
          el("td", {}, first(a.before)), el("td", {}, first(a.after)), el("td", { class: mark(a)[1] }, mark(a)[0])))))),
      el("p", { class: "note" }, report.protocol, ". A glance, not a measurement."));
  } catch (error) {
    answers.replaceChildren(el("p", { class: "bad" }, error.message));
  }
}

// -- compare and trace ---------------------------------------------------------------------------

function stack(text) {
  const words = text.trim().split(/[\s,]+/).filter(Boolean);
  if (!words.length || (words.length === 1 && words[0] === "active")) return {};
  if (words.length === 1 && words[0] === "base") return { only: [] };
  if (words.every((w) => w.startsWith("-"))) return { without: words.map((w) => w.slice(1)) };
  return { only: words };
}

async function compare(form) {
  const given = Object.fromEntries(new FormData(form));
  const found = await ask("errata/compare", { prompt: given.prompt, a: stack(given.a), b: stack(given.b), max_tokens: Number(given.max_tokens) });
  const p = (x) => x.toFixed(x < 0.1 ? 3 : 2);
  const side = (name, other, part) => el("div", {},
    el("h3", {}, `${name}: ${part.edits.length ? part.edits.join(", ") : "the base"}`),
    el("div", { class: "tokens" }, el("span", { class: "prompt" }, found.prompt),
      part.tokens.map((t) => el("span", { class: t.other_says ? "differs" : "", title: `P ${p(t.own)}, under ${other} ${p(t.other)}` }, t.text))),
    el("div", { class: "scroll" }, el("table", {},
      el("thead", {}, el("tr", {}, el("th", {}, "token"), el("th", { class: "num" }, `P under ${name}`), el("th", { class: "num" }, `P under ${other}`), el("th", {}, `${other} would say`))),
      el("tbody", {}, part.tokens.map((t) => el("tr", {}, el("td", { class: "mono" }, JSON.stringify(t.text)), el("td", { class: "num" }, p(t.own)),
        el("td", { class: "num" }, p(t.other)), el("td", { class: "mono" }, t.other_says ? JSON.stringify(t.other_says) : "the same")))))));
  $("compared").replaceChildren(side("A", "B", found.a), side("B", "A", found.b));
}

async function trace(form) {
  const given = Object.fromEntries(new FormData(form));
  const answer = await send("errata/trace", { prompt: given.prompt, subject: given.subject, kind: given.kind, estimate: Boolean(given.estimate), edits: stack(given.edits) });
  const url = URL.createObjectURL(await answer.blob());
  const image = el("img", { src: url, alt: `Causal trace of “${given.prompt}”: tokens down, layers across` });
  image.addEventListener("load", () => URL.revokeObjectURL(url));
  const note = answer.headers.get("Errata-Note");
  $("traced").replaceChildren(image, note ? el("p", { class: "warn" }, note) : "");
}

// -- chat ----------------------------------------------------------------------------------------

const talks = { left: [], right: [] };

async function speak(side, text, plain, limit) {
  const log = $(`log-${side}`), talk = talks[side];
  const errata = stack($(`chat-${side}`).value);
  const said = el("p", {});
  log.append(el("p", { class: "you" }, text), said);
  if (!plain) talk.push({ role: "user", content: text });
  const body = plain ? { prompt: text } : { messages: talk };
  const answer = await send(plain ? "v1/completions" : "v1/chat/completions", { ...body, max_tokens: limit, stream: true, errata });
  const lines = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let whole = "", rest = "";
  for (;;) {
    const { done, value } = await lines.read();
    if (done) break;
    const parts = (rest + value).split("\n\n");
    rest = parts.pop();
    for (const part of parts) {
      const data = part.replace(/^data: /, "");
      if (data === "[DONE]") continue;
      const event = JSON.parse(data);
      if (event.error) throw new Error(event.error.message);
      whole += plain ? event.choices[0].text : event.choices[0].delta.content || "";
      said.textContent = shown(whole) || "(nothing)";
      log.scrollTop = log.scrollHeight;
    }
  }
  if (!plain) talk.push({ role: "assistant", content: whole });
}

async function chat(form) {
  const { text, plain, max_tokens: limit } = Object.fromEntries(new FormData(form));
  form.elements.text.value = "";
  const both = await Promise.allSettled(["left", "right"].map((side) => speak(side, text, Boolean(plain), Number(limit))));
  const failed = both.find((one) => one.status === "rejected");
  if (failed) throw failed.reason;
}

function clear() {
  for (const side of ["left", "right"]) {
    talks[side] = [];
    $(`log-${side}`).replaceChildren();
  }
  queueMicrotask(() => { $("chat").elements.plain.checked = !state.chat; });
}

// -- views ---------------------------------------------------------------------------------------

function view() {
  const known = ["edits", "compare", "trace", "chat"];
  const name = known.includes(location.hash.slice(1)) ? location.hash.slice(1) : "edits";
  for (const one of known) $(`view-${one}`).hidden = one !== name;
  for (const link of document.querySelectorAll("nav a")) {
    if (link.hash === `#${name}`) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  $("error").hidden = true;
}

function onSubmit(id, work) {
  $(id).addEventListener("submit", (event) => {
    event.preventDefault();
    busy(event.submitter || $(id).querySelector("button"), () => work($(id)));
  });
}

onSubmit("compare", compare);
onSubmit("trace", trace);
onSubmit("chat", chat);
$("chat").addEventListener("reset", clear);
$("chat").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) $("chat").requestSubmit();
});
let typed;
$("search").addEventListener("submit", (event) => { event.preventDefault(); list().catch(fail); });
$("query").addEventListener("input", () => { clearTimeout(typed); typed = setTimeout(() => list().catch(fail), 200); });
$("stop").addEventListener("click", () => { stopper.abort(); stopper = new AbortController(); });
$("confirm-no").addEventListener("click", () => $("confirm").close("no"));
$("more").addEventListener("click", () => busy($("more"), () => list($("list").children.length)));
addEventListener("hashchange", view);
view();
refresh().then(() => list()).catch(fail);
