"use strict";
// The browser of cases. Texts are only ever put in as text, never as markup.
(function () {
  const data = JSON.parse(document.getElementById("data").textContent);
  const form = document.getElementById("filters");
  if (!data.rows.length) { return; }
  const PAGE = 20;
  const [SECTION, COLUMN, MOMENT, SEED, CASE, TITLE, TROUBLE, FAILED, STEP, ANSWERS, VALUES] =
    [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10];
  const [PROMPT, EXPECTED, METRIC, TYPE, BASE, SAID, VERDICT, ERROR] = [0, 1, 2, 3, 4, 5, 6, 7];
  const VERDICTS = ["✗ wrong", "✓ contained", "✓ right"];
  const seeds = new Set(data.rows.map((row) => row[SEED])).size > 1;
  const asked = [...new Set(data.rows.flatMap((row) => row[ANSWERS].map((a) => a[METRIC])))];
  let found = [], page = 0;

  function make(tag, attributes, ...children) {
    const element = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes || {})) { element.setAttribute(name, value); }
    element.append(...children);
    return element;
  }

  function choices(name, any, labels) {
    const select = form.elements[name];
    if (any !== null) { select.append(make("option", { value: "" }, any)); }
    labels.forEach(([value, label]) => select.append(make("option", { value: String(value) }, label)));
  }

  const all = (list) => list.map((label, index) => [index, label]);
  choices("section", "all", all(data.sections));
  choices("column", "all", all(data.columns.map((column) => column[0])));
  choices("moment", "at any time", all(data.moments));
  choices("metric", "any", asked.map((index) => [index, data.metrics[index]]));
  choices("error", "any", all(data.errors).slice(1).map(([i, name]) => [i, name.replaceAll("_", " ")]));
  if (asked.length) { form.elements.metric.value = String(asked[0]); }
  form.querySelectorAll(".only-many").forEach((label) => {
    label.hidden = data[label.dataset.list].length < 2;
  });
  form.hidden = false;

  function matching(text) {
    const wanted = text.trim().toLowerCase();
    if (!wanted) { return null; }
    return data.texts.map((one) => one.toLowerCase().includes(wanted));
  }

  function has(row, hit) {
    return hit[row[CASE]] || hit[row[TITLE]] || (row[TROUBLE] >= 0 && hit[row[TROUBLE]]) ||
      row[ANSWERS].some((a) => hit[a[PROMPT]] || hit[a[SAID]] || (a[BASE] >= 0 && hit[a[BASE]]) ||
        data.expected[a[EXPECTED]].some((place) => hit[place]));
  }

  function relevant(row) {
    const metric = form.elements.metric.value;
    return metric === "" ? row[ANSWERS] : row[ANSWERS].filter((a) => a[METRIC] === Number(metric));
  }

  function filter() {
    const value = (name) => form.elements[name].value;
    const same = (name, place) => value(name) === "" || place === Number(value(name));
    const hit = matching(value("search"));
    const verdict = value("verdict"), error = value("error");
    const tests = {
      right: (a) => a[VERDICT] === 2, contained: (a) => a[VERDICT] > 0, wrong: (a) => a[VERDICT] === 0,
      changed: (a) => a[BASE] >= 0 && a[BASE] !== a[SAID],
    };
    found = data.rows.filter((row) => {
      if (!same("section", row[SECTION]) || !same("column", row[COLUMN]) || !same("moment", row[MOMENT])) {
        return false;
      }
      if (verdict === "trouble" && row[TROUBLE] < 0) { return false; }
      const one = tests[verdict];
      if (one || error !== "") {
        const fits = (a) => (!one || one(a)) && (error === "" || a[ERROR] === Number(error));
        if (!relevant(row).some(fits)) { return false; }
      }
      return !hit || has(row, hit);
    });
    page = 0;
    show();
  }

  function show() {
    const pages = Math.max(1, Math.ceil(found.length / PAGE));
    page = Math.min(Math.max(page, 0), pages - 1);
    const part = found.slice(page * PAGE, (page + 1) * PAGE);
    document.getElementById("list").replaceChildren(...part.map(card));
    document.getElementById("found").textContent =
      `${found.length.toLocaleString("en")} of ${data.rows.length.toLocaleString("en")} results`;
    document.getElementById("place").textContent = `page ${page + 1} of ${pages}`;
    const pager = document.getElementById("pager");
    pager.hidden = pages === 1;
    pager.querySelector('[data-move="-1"]').disabled = page === 0;
    pager.querySelector('[data-move="1"]').disabled = page === pages - 1;
  }

  function swatch(column) {
    const place = data.columns[column][1];
    const dot = make("span", { class: `c${(place - 1) % 8}`, "aria-hidden": "true" }, "● ");
    return make("span", {}, dot, make("strong", { dir: "auto" }, data.columns[column][0]));
  }

  function card(row) {
    const meta = make("div", { class: "meta" }, swatch(row[COLUMN]), make("span", {}, `case ${data.texts[row[CASE]]}`));
    if (data.sections.length > 1) { meta.append(make("span", {}, data.sections[row[SECTION]])); }
    const moment = data.moments[row[MOMENT]];
    if (moment) { meta.append(make("span", {}, `${moment}, ${row[STEP]} ${row[STEP] === 1 ? "edit" : "edits"} on the model`)); }
    if (seeds) { meta.append(make("span", {}, `seed ${row[SEED]}`)); }
    const box = make("article", { class: "case" }, make("h4", { dir: "auto" }, data.texts[row[TITLE]]), meta);
    if (row[TROUBLE] >= 0) {
      box.append(make("p", { class: "trouble", dir: "auto" }, `${row[FAILED] ? "Failed" : "Refused"}: ${data.texts[row[TROUBLE]]}`));
    }
    const first = relevant(row);
    if (first.length) { box.append(answers(first)); }
    if (row[VALUES].length || row[ANSWERS].length > first.length) { box.append(rest(row)); }
    return box;
  }

  function rest(row) {
    const more = make("details", {}, make("summary", {},
      `All ${row[ANSWERS].length} answers and ${row[VALUES].length} metrics`));
    more.addEventListener("toggle", () => {
      if (!more.open || more.childElementCount > 1) { return; }
      if (row[ANSWERS].length) { more.append(answers(row[ANSWERS])); }
      more.append(make("ul", { class: "values" }, ...row[VALUES].map(([metric, value]) =>
        make("li", {}, `${data.metrics[metric]} `, make("b", {}, String(value))))));
    });
    return more;
  }

  function answers(list) {
    const names = ["prompt", "expected", "base", "edited", "verdict"];
    const body = make("tbody");
    list.forEach((a) => {
      const expected = data.expected[a[EXPECTED]].map((place) => data.texts[place]);
      const base = a[BASE] < 0 ? "–" : data.texts[a[BASE]];
      const verdict = make("td", { class: "verdict", "data-name": names[4] }, VERDICTS[a[VERDICT]]);
      const kind = data.errors[a[ERROR]].replaceAll("_", " ");
      const type = data.types[a[TYPE]].replaceAll("_", " ");
      verdict.append(make("small", {}, [kind, data.metrics[a[METRIC]], type].filter(Boolean).join(" · ")));
      body.append(make("tr", { class: ["wrong", "contained", "right"][a[VERDICT]] },
        make("td", { dir: "auto", "data-name": names[0] }, data.texts[a[PROMPT]]),
        make("td", { dir: "auto", "data-name": names[1] }, expected.join(" / ")),
        make("td", { class: "said muted", "data-name": names[2] }, make("div", { dir: "auto" }, base.trim())),
        make("td", { class: "said", "data-name": names[3] }, make("div", { dir: "auto" }, data.texts[a[SAID]].trim() || "(nothing)")),
        verdict));
    });
    const head = make("tr", {}, ...names.map((name) => make("th", { scope: "col" }, name)));
    return make("table", { class: "answers" }, make("thead", {}, head), body);
  }

  let waiting = 0;
  form.addEventListener("input", () => { clearTimeout(waiting); waiting = setTimeout(filter, 120); });
  form.addEventListener("submit", (event) => { event.preventDefault(); filter(); });
  document.getElementById("pager").addEventListener("click", (event) => {
    const move = Number(event.target.dataset && event.target.dataset.move);
    if (!move) { return; }
    page += move;
    show();
    document.getElementById("found").scrollIntoView({ block: "start" });
  });
  filter();
})();
