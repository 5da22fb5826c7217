"use strict";
const $ = (id) => document.getElementById(id);
const data = JSON.parse($("data").textContent);
const pictures = JSON.parse($("pictures").textContent); // [number of the image, image, map]
const { kinds, kind, scores, names, labelled, normalised } = data;

// Okabe and Ito's colours, which the colour-blind can tell apart; more kinds than colours are hatched
const COLOURS = ["#D55E00", "#E69F00", "#56B4E9", "#CC79A7", "#009E73", "#0072B2", "#F0E442", "#000000"];
const PATTERNS = ["", "/", "\\", "x", "-", "|", "+", "."];
const style = (k) => (k === 0 ? ["#7A8794", ""]
  : [COLOURS[(k - 1) % COLOURS.length], PATTERNS[Math.floor((k - 1) / COLOURS.length) % PATTERNS.length]]);

const highest = scores.reduce((a, b) => Math.max(a, b), -Infinity);
const lowest = scores.reduce((a, b) => Math.min(a, b), Infinity);
const initial = data.threshold ?? highest;
const low = normalised ? 0 : Math.min(lowest, initial);
const high = normalised ? 1 : Math.max(highest, initial, low + 1e-6);
const decimals = Math.max(3, Math.ceil(-Math.log10((high - low) / 1000)));
let threshold = initial;
let dragged = null; // where the line was taken, while it is

const share = (n, of) => (of ? `${(100 * n / of).toFixed(1)} %` : "–");
const some = (n, of) => (of ? `${n.toLocaleString("en")} of ${of.toLocaleString("en")}` : "none tested");
const plural = (n, one, more) => `${n.toLocaleString("en")} ${n === 1 ? one : more}`;
const shown = (value) => {
  const short = String(Number(value.toPrecision(6)));
  return short.length < 5 && !short.includes("e") ? Number(short).toFixed(2) : short;
};

function make(tag, properties = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}

function swatch(k) {
  const mark = make("span", { className: "swatch" });
  const [colour, pattern] = style(k);
  mark.style.background = pattern ? `repeating-linear-gradient(45deg, ${colour} 0 2px, #fff 2px 4px)` : colour;
  return mark;
}

// charts

const FONT = { family: "system-ui, 'Segoe UI', Roboto, Arial, sans-serif", size: 14, color: "#1b1f24" };
const CONFIG = { displayModeBar: false, responsive: true, doubleClick: false };
const axis = (title, options) => ({
  title: { text: title }, fixedrange: true, gridcolor: "#e6e9ed", zerolinecolor: "#8a949e", ...options,
});

function drawHistogram() {
  const size = (high - low) / 50;
  const traces = kinds.map((name, k) => {
    const [colour, pattern] = style(k);
    return {
      type: "histogram", name, x: scores.filter((_, i) => kind[i] === k), xbins: { start: low, end: high + size, size },
      marker: { color: colour, pattern: { shape: pattern }, line: { width: 1, color: "#fff" } },
      hovertemplate: `%{x}: %{y} %{fullData.name}<extra></extra>`,
    };
  });
  const layout = {
    barmode: "stack", font: FONT, dragmode: false, margin: { l: 48, r: 12, t: 12, b: 44 }, bargap: 0,
    xaxis: axis("score", { range: [low - size / 2, high + size] }), yaxis: axis("images", { rangemode: "tozero" }),
    showlegend: false, shapes: [line()],
  };
  Plotly.newPlot($("histogram"), traces.filter((t) => t.x.length), layout, { ...CONFIG, edits: { shapePosition: true } });
  if (labelled) $("legend").replaceChildren(...kinds.map((name, k) => make("span", {}, swatch(k), name)));
  const moved = (change) => {
    const ends = ["shapes[0].x0", "shapes[0].x1"].map((name) => change[name]).filter((x) => x !== undefined);
    if (ends.length) moveTo(ends.sort((a, b) => Math.abs(b - threshold) - Math.abs(a - threshold))[0]);
  };
  $("histogram").on("plotly_relayout", (change) => {
    dragged = null;
    moved(change);
    // dragged by its end, the line leans; dragged up, it leaves the chart
    if (Object.keys(change).some((name) => name.startsWith("shapes[0]")) && !straight()) {
      Plotly.relayout($("histogram"), { shapes: [line()] });
    }
  });
}

// Plotly tells of a line when it is let go, figures are to follow before
$("histogram").addEventListener("pointerdown", (event) => {
  const on = event.target.closest(".shapelayer");
  dragged = on && { x: event.clientX, from: threshold };
}, true);
addEventListener("pointermove", (event) => {
  if (!dragged) return;
  const [start, end] = $("histogram").layout.xaxis.range;
  const { width } = $("histogram").querySelector(".nsewdrag").getBoundingClientRect();
  moveTo(dragged.from + (event.clientX - dragged.x) / width * (end - start));
}, true);
for (const name of ["pointerup", "pointercancel"]) addEventListener(name, () => setTimeout(() => { dragged = null; }), true);

function line() {
  return { type: "line", xref: "x", yref: "paper", x0: threshold, x1: threshold, y0: 0, y1: 1, editable: true,
    line: { color: "#000", width: 3 } };
}

function straight() {
  const { x0, x1, y0, y1 } = $("histogram").layout.shapes[0];
  return x0 === threshold && x1 === threshold && y0 === 0 && y1 === 1;
}

function drawCurve(id, x, y, curve) {
  const range = { range: [-0.02, 1.02], tickformat: ".0%" };
  const layout = {
    font: FONT, dragmode: false, showlegend: false, margin: { l: 60, r: 12, t: 16, b: 48 },
    xaxis: axis(x, range), yaxis: axis(y, range),
  };
  const hovertemplate = `${y} %{y:.1%}<br>${x} %{x:.1%}<extra></extra>`;
  const traces = [
    { ...curve, mode: "lines", line: { color: "#0072B2", width: 3 }, hovertemplate, cliponaxis: false },
    { x: [null], y: [null], mode: "markers", hoverinfo: "skip", cliponaxis: false,
      marker: { color: "#000", size: 13, line: { color: "#fff", width: 2 } } },
  ];
  Plotly.newPlot($(id), traces, layout, CONFIG);
}

// figures

function count() {
  const images = kinds.map(() => 0), rejected = kinds.map(() => 0);
  scores.forEach((score, i) => {
    images[kind[i]] += 1;
    rejected[kind[i]] += score > threshold;
  });
  return { images, rejected };
}

function showFigures() {
  const { images, rejected } = count();
  const sum = (list) => list.reduce((a, b) => a + b, 0);
  const above = sum(rejected);
  const tell = (id, n, of) => {
    $(id).textContent = some(n, of);
    $(`${id}-share`).textContent = share(n, of);
  };
  tell("rejected", above, scores.length);
  if (normalised) $("camera").textContent = `--threshold ${shown(threshold)}`;
  if (!labelled) {
    $("summary").textContent = `${plural(above, "image", "images")} rejected (${share(above, scores.length)})`;
    return { rejected: above };
  }
  const good = images[0], falseRejects = rejected[0];
  const defects = scores.length - good, found = above - falseRejects, escapes = defects - found;
  tell("false-rejects", falseRejects, good);
  tell("escapes", escapes, defects);
  $("precision").textContent = share(defects ? found : 0, defects ? above : 0);
  $("recall").textContent = share(found, defects);
  const parts = [good && plural(falseRejects, "false reject", "false rejects"), defects && plural(escapes, "escape", "escapes")];
  $("summary").textContent = parts.filter(Boolean).join(" · ");
  if (kinds.length > 1) {
    $("kinds").replaceChildren(...kinds.slice(1).map((name, j) => {
      const k = j + 1, cells = [images[k], rejected[k], images[k] - rejected[k], share(rejected[k], images[k])];
      return make("tr", {}, make("td", {}, swatch(k), name), ...cells.map((text) => make("td", {}, String(text))));
    }));
  }
  if (data.roc) {
    Plotly.restyle($("roc"), { x: [[falseRejects / good]], y: [[found / defects]] }, [1]);
    const precision = above ? found / above : 1;
    Plotly.restyle($("precision-recall"), { x: [[found / defects]], y: [[precision]] }, [1]);
  }
  return { rejected: above, "false reject": falseRejects, escape: escapes, mistake: falseRejects + escapes };
}

// images

function verdict(i) {
  const above = scores[i] > threshold;
  if (!labelled || above === (kind[i] > 0)) return above ? "rejected" : "accepted";
  return above ? "false reject" : "escape";
}

const WANTED = {
  all: () => true,
  rejected: (i) => scores[i] > threshold,
  "false reject": (i) => verdict(i) === "false reject",
  escape: (i) => verdict(i) === "escape",
  mistake: (i) => ["false reject", "escape"].includes(verdict(i)),
};
const BATCH = 60;
const cards = new Map();
let ascending = false, most = BATCH, present = [];
pictures.sort((a, b) => scores[b[0]] - scores[a[0]] || a[0] - b[0]);

function card([i, image, map]) {
  const url = (file) => `data:image/webp;base64,${file}`;
  const button = make("button", { type: "button" }, make("img", { alt: "", src: url(image), decoding: "async" }));
  if (map) button.append(make("img", { alt: "", src: url(map), className: "map", decoding: "async" }));
  button.setAttribute("aria-pressed", "false");
  // not by :hover, which a tap leaves on
  button.addEventListener("pointerenter", (event) => button.classList.toggle("over", event.pointerType === "mouse"));
  button.addEventListener("pointerleave", () => button.classList.remove("over"));
  button.addEventListener("click", () => {
    button.setAttribute("aria-pressed", String(button.getAttribute("aria-pressed") !== "true"));
  });
  const file = make("span", { className: "name", title: names[i] }, names[i].split("/").pop());
  const score = make("span", { className: "score" }, scores[i].toFixed(decimals));
  const of = make("span", { className: "kind", title: kinds[kind[i]] }, swatch(kind[i]), kinds[kind[i]]);
  const judged = make("span", { className: "verdict" });
  const element = make("li", { className: "card" }, button, make("p", {}, file), make("p", {}, of),
    make("p", {}, score, judged));
  const judge = () => {
    const text = verdict(i);
    judged.textContent = text;
    element.classList.toggle("wrong", text === "false reject" || text === "escape");
    button.setAttribute("aria-label", `${names[i]}, ${kinds[kind[i]]}, score ${score.textContent}, ${text}: anomaly map`);
  };
  return { element, judge };
}

function showGallery() {
  const wanted = WANTED[document.querySelector("input[name=show]:checked").value];
  const of = $("kind")?.value ?? "";
  const chosen = pictures.filter(([i]) => wanted(i) && (of === "" || kind[i] === Number(of)));
  if (ascending) chosen.reverse();
  const next = chosen.slice(0, most);
  $("none").hidden = chosen.length > 0;
  for (const picture of next) if (!cards.has(picture[0])) cards.set(picture[0], card(picture));
  for (const { judge } of cards.values()) judge();
  if (next.length !== present.length || next.some((picture, j) => picture !== present[j])) {
    $("gallery").replaceChildren(...next.map(([i]) => cards.get(i).element));
    present = next;
  }
  return chosen.length;
}

const atEnd = new IntersectionObserver(([entry]) => {
  if (!entry.isIntersecting || most > pictures.length) return;
  most += BATCH;
  showGallery();
  watchEnd();
}, { rootMargin: "600px" });

function watchEnd() { // anew, to be told also of an end that has stayed in sight
  atEnd.disconnect();
  atEnd.observe($("more"));
}

function showFromStart() {
  most = BATCH;
  showGallery();
  watchEnd();
}

$("filters").addEventListener("change", showFromStart);
$("filters").addEventListener("submit", (event) => event.preventDefault());
$("order").addEventListener("click", () => {
  ascending = !ascending;
  $("order").textContent = ascending ? "Highest score first" : "Lowest score first";
  showFromStart();
});

// the threshold, which has three handles

function moveTo(value) {
  setThreshold(Number(value.toFixed(decimals)));
}

let waiting = false;
function setThreshold(value) {
  threshold = Math.min(high, Math.max(low, value));
  if (!waiting) requestAnimationFrame(show);
  waiting = true;
}

function show() {
  waiting = false;
  if (document.activeElement !== $("number") || Number($("number").value) !== threshold) $("number").value = shown(threshold);
  $("slider").value = threshold;
  if (!dragged && !straight()) Plotly.relayout($("histogram"), { shapes: [line()] });
  const counts = { all: scores.length, ...showFigures() };
  for (const input of document.querySelectorAll("input[name=show]")) {
    input.nextElementSibling.textContent = counts[input.value].toLocaleString("en");
  }
  showGallery();
}

for (const input of [$("number"), $("slider")]) {
  Object.assign(input, { min: low, max: high, step: 10 ** -decimals });
}
$("slider").addEventListener("input", () => moveTo(Number($("slider").value)));
$("number").addEventListener("change", () => {
  if ($("number").value !== "") setThreshold(Number($("number").value));
});
$("reset").addEventListener("click", () => setThreshold(initial));

drawHistogram();
if (data.roc) {
  drawCurve("roc", "false rejects", "defects found", data.roc);
  drawCurve("precision-recall", "defects found (recall)", "precision", data.precision_recall);
}
show();
watchEnd();
