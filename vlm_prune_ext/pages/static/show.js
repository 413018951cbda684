// The page about a sweep. Texts of data sets and models go into the page as text nodes only.
const content = JSON.parse(document.getElementById("content").textContent);
const at = (id) => document.getElementById(id);
const BASE = "none";

/** A name that may break behind its underscores. */
const breakable = (text) => text.split(/(?<=_)/).flatMap((part) => [part, make("wbr")]);

function fillSelect(select, options) {
  select.replaceChildren(...options.map(([value, text]) => make("option", { value }, text)));
}

// -- methods: a colour and a shape each ----------------------------------------------------------
const COLORS = {
  light: ["#4269d0", "#d9730d", "#c2255c", "#2b8a3e", "#7b4fc9", "#0b7f8a", "#9c6b4e", "#b8860b", "#d6449a", "#5c6773"],
  dark: ["#85a3ff", "#ffa94d", "#ff7da5", "#69db7c", "#b197fc", "#4dd0d9", "#d0a184", "#ffd43b", "#faa2d0", "#b6c0cb"],
};
const SHAPES = ["circle", "square", "triangle-up", "diamond", "triangle-down", "cross"];
const OUTLINES = {
  circle: "M10 5.5a4.5 4.5 0 1 1-9 0a4.5 4.5 0 1 1 9 0z",
  square: "M1.5 1.5h8v8h-8z",
  "triangle-up": "M5.5 1l4.8 8.6h-9.6z",
  diamond: "M5.5 .5l4.2 5-4.2 5-4.2-5z",
  "triangle-down": "M5.5 10l4.8-8.6h-9.6z",
  cross: "M4 1h3v3h3v3h-3v3h-3v-3h-3v-3h3z",
};
const methods = [BASE, ...content.methods.filter((name) => name !== BASE)];
const shown = new Set(methods);
const nameOf = (method) => (method === BASE ? "unpruned" : method);
const isDark = () => {
  const chosen = document.documentElement.dataset.theme;
  return chosen ? chosen === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
};
const textColor = () => (isDark() ? "#e7e9ec" : "#1c1e21");
function colorOf(method) {
  const place = methods.indexOf(method) - 1;
  const colors = COLORS[isDark() ? "dark" : "light"];
  return place < 0 ? textColor() : colors[place % colors.length];
}
function shapeOf(method) {
  const place = methods.indexOf(method) - 1;
  return place < 0 ? "diamond" : SHAPES[(place + Math.floor(place / COLORS.light.length)) % SHAPES.length];
}
function symbol(method) {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  svg.setAttribute("viewBox", "0 0 11 11");
  svg.setAttribute("aria-hidden", "true");
  const path = document.createElementNS("http://www.w3.org/2000/svg", "path");
  path.setAttribute("d", OUTLINES[shapeOf(method)]);
  path.setAttribute("fill", colorOf(method));
  svg.append(path);
  return svg;
}

// -- the figure ----------------------------------------------------------------------------------
const models = [...new Set(content.points.map((point) => point.model))];
const round = (value, digits) => (value === null || value === undefined ? "–" : value.toFixed(digits));

function front(points, cost) {
  let best = -Infinity;
  const sorted = [...points].sort((a, b) => a[cost] - b[cost] || b.score - a.score);
  return sorted.filter((point) => point.score > best && (best = point.score, true));
}

const POWERS = Array.from({ length: 20 }, (_, power) => 2 ** power);

function specOf(points, cost) {
  const soft = isDark() ? "#a2aab4" : "#5c636b";
  const line = isDark() ? "#33383f" : "#e4e6e9";
  const order = methods.filter((name) => shown.has(name));
  const x = {
    field: cost.name, type: "quantitative", title: cost.label,
    scale: cost.log ? { type: "log", nice: false, padding: 16 } : { zero: false, padding: 16 },
    axis: { grid: false, tickCount: 5, labelOverlap: "greedy", labelSeparation: 8, ...(cost.log ? { values: POWERS, format: "d" } : {}) },
  };
  const y = {
    field: "score", type: "quantitative", title: "score",
    scale: { zero: false, padding: 8 }, axis: { tickCount: 5 },
  };
  const color = {
    field: "method", type: "nominal", legend: null, scale: { domain: order, range: order.map(colorOf) },
  };
  const shape = {
    field: "method", type: "nominal", legend: null, scale: { domain: order, range: order.map(shapeOf) },
  };
  const base = points.filter((point) => point.method === BASE);
  const curves = order.filter((name) => name !== BASE).flatMap((name) =>
    [...points.filter((point) => point.method === name), ...base.map((point) => ({ ...point, method: name }))]);
  const tooltip = [
    ["title", "title"], ["said", "score"], ["rows", "rows"], ["steps", "visual tokens"],
    ["mean", "mean over layers"], ["flopsSaid", "FLOPs"], ["ttftSaid", "TTFT"],
  ].map(([field, title]) => ({ field, title, type: "nominal" }));
  return {
    $schema: "https://vega.github.io/schema/vega-lite/v6.json",
    width: "container", height: 250, background: null, padding: 2,
    config: {
      view: { stroke: null }, font: "system-ui, sans-serif",
      axis: {
        labelColor: soft, titleColor: soft, gridColor: line, domainColor: soft, tickColor: soft,
        labelFontSize: 11, titleFontSize: 12, titleFontWeight: "normal",
      },
    },
    layer: [
      { data: { values: base }, mark: { type: "rule", strokeDash: [5, 4], color: soft, opacity: 0.7 }, encoding: { y } },
      { data: { values: front(points, cost.name) }, mark: { type: "line", strokeDash: [2, 3], color: soft, strokeWidth: 2 }, encoding: { x, y } },
      { data: { values: curves }, mark: { type: "line", strokeWidth: 1.4, opacity: 0.55 }, encoding: { x, y, color } },
      ...beside(points, cost).flatMap(([xOffset, some]) => [
        {
          data: { values: some }, mark: { type: "rule", strokeWidth: 1.4, opacity: 0.8, xOffset },
          encoding: { x, y: { ...y, field: "low" }, y2: { field: "high" }, color },
        },
        {
          data: { values: some },
          mark: { type: "point", filled: true, size: 95, opacity: 1, stroke: isDark() ? "#1d2024" : "#fff", strokeWidth: 1, xOffset },
          encoding: { x, y, color, shape, tooltip },
        },
      ]),
    ],
  };
}

/** Points by how many pixels they are drawn beside their place: those of one cost would hide each other. */
function beside(points, cost) {
  const found = new Map();
  for (const point of points) {
    const same = points.filter((other) => Math.abs(other[cost.name] - point[cost.name]) <= 0.015 * point[cost.name]);
    const offset = (same.indexOf(point) - (same.length - 1) / 2) * Math.min(8, 40 / same.length);
    found.set(offset, [...(found.get(offset) ?? []), point]);
  }
  return [...found];
}

function spoken(point) {
  const model = models.length > 1 ? `${point.model} ` : "";
  return {
    ...point,
    title: `${model}${point.method === BASE ? "unpruned" : point.setting.startsWith(point.method) ? point.setting : `${point.method}, ${point.setting}`}`,
    said: `${round(point.score, 1)}  [${round(point.low, 1)}, ${round(point.high, 1)}]`,
    mean: round(point.tokens, 1),
    flopsSaid: point.flops === null ? "–" : `${round(100 * point.flops, 1)} %`,
    ttftSaid: point.ttft === null ? "–" : `${round(point.ttft, 1)} ms`,
  };
}

let views = [];
let drawing = 0;
async function draw() {
  const mine = ++drawing;
  const cost = content.costs.find((one) => one.name === at("cost").value);
  const model = at("model").value;
  const mineOnly = content.points
    .filter((point) => point.model === model && shown.has(point.method) && point[cost.name] !== null && point.score !== null)
    .map(spoken);
  const names = [...new Set(content.points.map((point) => point.data))];
  const made = names.map((name) => [name, mineOnly.filter((point) => point.data === name)]).filter(([, points]) => points.length);
  views.forEach((view) => view.finalize());
  views = [];
  at("plots").replaceChildren(...made.map(([name]) =>
    make("div", { class: "plot", "data-set": name }, make("h3", {}, name), make("div", { class: "view" }))));
  if (!made.length) at("plots").replaceChildren(make("p", {}, "No run has this figure yet."));
  for (const [place, [name, points]] of made.entries()) {
    const target = at("plots").children[place].querySelector(".view");
    const view = await window.vegaEmbed(target, specOf(points, cost), {
      actions: false, renderer: "svg", ast: true, tooltip: { theme: "custom", disableDefaultStyle: true },
    });
    if (mine !== drawing) return view.finalize();
    views.push(view);
    target.setAttribute("role", "img");
    target.setAttribute("aria-label", `${name}: score against ${cost.label}, ${points.length} settings; the table has the figures`);
  }
  at("plots").dataset.ready = cost.name;
}

function legend() {
  at("legend").replaceChildren(...methods.filter((name) => content.points.some((point) => point.method === name)).map((name) =>
    make("button", {
      type: "button", "aria-pressed": String(shown.has(name)),
      onclick: (event) => {
        if (!shown.delete(name)) shown.add(name);
        event.currentTarget.setAttribute("aria-pressed", String(shown.has(name)));
        draw();
      },
    }, symbol(name), nameOf(name))));
}

// -- the table -----------------------------------------------------------------------------------
const columns = content.table.columns.map((column, place) => ({ ...column, place }));
const sorting = { place: -1, up: true };

function compare(a, b) {
  const [[x, s], [y, t]] = [a[sorting.place], b[sorting.place]];
  const blank = (value, text) => value === null && (text === "-" || text === "");
  if (blank(x, s) || blank(y, t)) return blank(x, s) - blank(y, t);  // at the end either way
  const found = x !== null && y !== null ? x - y : s.localeCompare(t, undefined, { numeric: true });
  return sorting.up ? found : -found;
}

function drawTable() {
  const visible = columns.filter((column) => column.shown);
  at("table").tHead.replaceChildren(make("tr", {}, ...visible.map((column) => {
    const sorted = sorting.place === column.place ? (sorting.up ? "ascending" : "descending") : "none";
    return make("th", { scope: "col", class: column.left ? "left" : "", "aria-sort": sorted },
      make("button", { type: "button", title: column.note, "data-column": column.name, onclick: () => sortBy(column) }, column.name));
  })));
  const wanted = at("find-run").value.toLowerCase().split(/\s+/).filter(Boolean);
  const rows = content.table.rows.filter((row) => {
    const text = row.map((cell) => cell[1]).join(" ").toLowerCase();
    return wanted.every((word) => text.includes(word));
  });
  if (sorting.place >= 0) rows.sort(compare);
  at("table").tBodies[0].replaceChildren(...rows.map((row) => make("tr", {}, ...visible.map((column) =>
    make("td", { class: column.left ? "left" : "" },
      ...(column === visible[0] ? breakable(row[column.place][1]) : [row[column.place][1] === "-" ? "–" : row[column.place][1]]))))));
  at("notes").replaceChildren(...visible.filter((column) => column.note).map((column) =>
    make("div", {}, make("dt", {}, column.name), make("dd", {}, column.note))));
}

function sortBy(column) {
  const up = sorting.place === column.place ? !sorting.up : column.left;
  Object.assign(sorting, { place: column.place, up });
  drawTable();
  at("table").querySelector(`[aria-sort="${up ? "ascending" : "descending"}"] button`).focus();
}

function columnChoices() {
  at("columns").querySelector(".choices").replaceChildren(...columns.map((column) =>
    make("label", { title: column.note },
      make("input", {
        type: "checkbox", checked: column.shown,
        onchange: (event) => { column.shown = event.target.checked; drawTable(); },
      }), column.name)));
  at("columns").addEventListener("keydown", (event) => {
    if (event.key !== "Escape") return;
    at("columns").open = false;
    at("columns").querySelector("summary").focus();
  });
  document.addEventListener("click", (event) => {
    if (!at("columns").contains(event.target)) at("columns").open = false;
  });
}

// -- rows ----------------------------------------------------------------------------------------
const state = { rows: [], place: 0, setting: null };
const dataSet = () => content.data[Number(at("data").value)];
const said = (row) => row.answers.filter((answer) => answer !== null);
const plain = (text) => text.trim().toLowerCase();
const scored = (row) => said(row).filter((answer) => answer.score !== null);
const isRight = (answer) => answer.score > 0.5;

function baseline(row, data) {
  const place = data.settings.findIndex((setting) => setting.method === BASE);
  return place < 0 ? null : row.answers[place];
}
const WHICH = [
  ["all", "all rows", () => true],
  ["differ", "settings disagree", (row) => {
    const marks = scored(row);
    return marks.length ? new Set(marks.map((answer) => answer.score)).size > 1
      : new Set(said(row).map((answer) => plain(answer.text))).size > 1;
  }],
  ["lost", "unpruned right, another wrong", (row, data) => {
    const base = baseline(row, data);
    return base && base.score !== null && isRight(base) && scored(row).some((answer) => !isRight(answer));
  }],
  ["gained", "unpruned wrong, another right", (row, data) => {
    const base = baseline(row, data);
    return base && base.score !== null && !isRight(base) && scored(row).some(isRight);
  }],
  ["wrong", "all wrong", (row) => scored(row).length && !scored(row).some(isRight)],
  ["failed", "failed", (row) => said(row).some((answer) => answer.failed)],
];

function drawList() {
  const data = dataSet();
  const test = WHICH.find(([name]) => name === at("which").value)[2];
  const category = at("category").value;
  const wanted = at("find-row").value.toLowerCase().split(/\s+/).filter(Boolean);
  state.rows = data.rows.filter((row) => {
    if (!test(row, data) || (category && row.category !== category)) return false;
    const texts = [row.question, row.answer, ...row.options.map((option) => option[1]), ...said(row).map((a) => a.text)];
    const text = texts.join(" ").toLowerCase();
    return wanted.every((word) => text.includes(word));
  });
  state.place = 0;
  const part = data.rows.length < data.total ? ` (of ${data.total}; those on which settings disagree were taken first)` : "";
  at("count").textContent = `${state.rows.length} of ${data.rows.length} rows${part}`;
  at("list").replaceChildren(...state.rows.map((row, place) => {
    const marks = scored(row);
    const tally = marks.length ? `${marks.filter(isRight).length} of ${marks.length} right`
      : `${new Set(said(row).map((answer) => plain(answer.text))).size} different answers`;
    const picture = row.pictures.find((each) => each >= 0);
    return make("li", {}, make("button", { type: "button", onclick: () => pick(place, false) },
      picture === undefined ? make("span", { class: "blank" }) : make("img", { src: content.pictures[picture], alt: "" }),
      make("span", {}, make("span", { class: "asks" }, row.question || row.index),
        make("span", { class: "tally" }, [tally, row.category].filter(Boolean).join(" · ")))));
  }));
  pick(0, false);
}

function pick(place, focus) {
  state.place = place;
  [...at("list").children].forEach((item, index) =>
    item.firstChild.setAttribute("aria-current", String(index === place)));
  const button = at("list").children[place]?.firstChild;
  if (button && focus) {
    button.focus({ preventScroll: true });
    at("list").scrollTop = Math.max(0, button.offsetTop - at("list").offsetTop - 60);
  }
  drawDetail();
}

function drawDetail() {
  const data = dataSet();
  const row = state.rows[state.place];
  if (!row) return at("detail").replaceChildren(make("p", { class: "note" }, "No row is left by these filters."));
  const places = data.settings.map((_, place) => place).filter((place) => row.answers[place]);
  const drawn = places.filter((place) => row.answers[place].panels.length);
  const named = drawn.find((place) => data.settings[place].name === state.setting);
  const chosen = named ?? drawn[0] ?? null;
  const step = (by, name) => make("button", {
    type: "button", disabled: !state.rows[state.place + by], onclick: () => { pick(state.place + by, false); at("detail").querySelector(`[data-step="${by}"]`).focus(); }, "data-step": by,
  }, name);
  const parts = [
    make("div", { class: "steps" }, step(-1, "← Previous"), step(1, "Next →"), [`row ${row.index}`, row.category].filter(Boolean).join(" · ")),
    make("h3", {}, row.question),
  ];
  if (row.hint) parts.push(make("p", { class: "truth" }, row.hint));
  if (row.options.length)
    parts.push(make("ul", { class: "options" }, ...row.options.map(([letter, text]) =>
      make("li", { class: letter === row.answer ? "is-right" : "" }, `${letter}. ${text}${letter === row.answer ? " (right)" : ""}`))));
  else if (row.answer) parts.push(make("p", { class: "truth" }, "Right answer: ", make("b", {}, row.answer)));
  parts.push(drawPanels(data, row, chosen), drawAnswers(data, row, places, chosen));
  at("detail").replaceChildren(...parts);
}

function drawPanels(data, row, chosen) {
  const panels = make("div", { class: "panels" });
  const pictures = row.pictures.filter((each) => each >= 0);
  const add = (picture, veil, title) => panels.append(make("figure", {},
    make("div", { class: "picture" },
      make("img", { src: content.pictures[picture], alt: title }),
      veil ? make("img", { class: "veil", src: veil, alt: "" }) : null),
    make("figcaption", {}, title)));
  pictures.forEach((picture) => add(picture, null, "the picture"));
  if (!pictures.length && row.pictures.length) panels.append(make("p", { class: "note" }, "The picture is not in this page: its file is gone, or there was no room."));
  if (chosen !== null && pictures.length === 1)
    for (const [title, veil] of row.answers[chosen].panels) add(pictures[0], content.veils[veil], `${data.settings[chosen].name}\n${title}`);
  return panels;
}

function drawAnswers(data, row, places, chosen) {
  const mark = (answer) => {
    if (answer.failed) return make("td", { class: "left wrong" }, `failed: ${answer.failed}`);
    if (answer.score === null) return make("td", { class: "left" }, "");
    const partly = answer.score > 0 && answer.score < 1 ? ` ${round(100 * answer.score, 0)} %` : "";
    const [sign, word] = isRight(answer) ? ["✓", "right"] : ["✗", "wrong"];
    return make("td", { class: `left mark ${word}` }, `${sign} `, make("span", {}, word + partly));
  };
  const lines = places.map((place) => {
    const [setting, answer] = [data.settings[place], row.answers[place]];
    return make("tr", { "aria-selected": String(place === chosen) },
      make("td", { class: "left" }, make("button", {
        type: "button", disabled: !answer.panels.length, "data-setting": setting.name,
        title: answer.panels.length ? "draw what it kept" : "",
        onclick: () => {
          state.setting = setting.name;
          drawDetail();
          [...at("detail").querySelectorAll("[data-setting]")].find((each) => each.dataset.setting === setting.name).focus();
        },
      }, make("span", { class: "dot", style: `background:${colorOf(setting.method)}` }), make("span", {}, ...breakable(setting.method === BASE ? "unpruned" : setting.name)))),
      make("td", { class: "left text" }, answer.text || "(nothing)"), mark(answer), make("td", { class: "count" }, answer.kept.join("")));
  });
  const head = (text, left = true) => make("th", { scope: "col", class: left ? "left" : "" }, text);
  return make("div", { class: "answers" }, make("table", {},
    make("thead", {}, make("tr", {}, head("setting"), head("answer"), head(""), head("tokens left", false))),
    make("tbody", {}, ...lines)));
}

function changeData() {
  const found = [...new Set(dataSet().rows.map((row) => row.category).filter(Boolean))].sort();
  fillSelect(at("category"), [["", "all"], ...found.map((name) => [name, name])]);
  at("category").parentElement.classList.toggle("hidden", !found.length);
  drawList();
}

// -- the page ------------------------------------------------------------------------------------
const THEMES = [["", "Theme: auto"], ["light", "Theme: light"], ["dark", "Theme: dark"]];
let theme = 0;
function showTheme() {
  at("theme").textContent = THEMES[theme][1];
  if (THEMES[theme][0]) document.documentElement.dataset.theme = THEMES[theme][0];
  else delete document.documentElement.dataset.theme;
}
function repaint() {
  legend();
  draw();
  drawDetail();
}

function start() {
  document.title = `Sweep ${content.title}`;
  at("title").textContent = content.title;
  at("facts").replaceChildren(...content.facts.map((fact) => make("li", {}, fact)));
  at("settings").replaceChildren(...content.settings.map(([name, value]) =>
    make("div", {}, make("dt", {}, name), make("dd", {}, value))));
  showTheme();
  at("theme").addEventListener("click", () => { theme = (theme + 1) % THEMES.length; showTheme(); repaint(); });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", repaint);

  const known = content.costs.filter((cost) => content.points.some((point) => point[cost.name] !== null));
  fillSelect(at("cost"), known.map((cost) => [cost.name, cost.label]));
  fillSelect(at("model"), models.map((name) => [name, name]));
  at("model-label").classList.toggle("hidden", models.length < 2);
  at("cost").addEventListener("change", draw);
  at("model").addEventListener("change", draw);
  at("figure").classList.toggle("hidden", !content.points.length);
  legend();
  if (content.points.length) draw();

  columnChoices();
  at("find-run").addEventListener("input", drawTable);
  drawTable();

  const filled = content.data.map((data, place) => [String(place), `${data.name} (${data.rows.length})`]).filter(([place]) => content.data[place].rows.length);
  at("rows").classList.toggle("hidden", !filled.length);
  if (!filled.length) return;
  fillSelect(at("data"), filled);
  fillSelect(at("which"), WHICH.map(([value, text]) => [value, text]));
  at("data").addEventListener("change", changeData);
  for (const id of ["which", "category"]) at(id).addEventListener("change", drawList);
  at("find-row").addEventListener("input", drawList);
  at("list").addEventListener("keydown", (event) => {
    const by = { ArrowDown: 1, ArrowUp: -1 }[event.key];
    if (!by) return;
    event.preventDefault();
    if (state.rows[state.place + by]) pick(state.place + by, true);
  });
  changeData();
}
start();
