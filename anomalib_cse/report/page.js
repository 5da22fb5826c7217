"use strict";
const $ = (id) => document.getElementById(id);
const data = JSON.parse($("data").textContent);
const pictures = JSON.parse($("pictures").textContent); // [number of the image, image, map]
const { kinds, kind, scores, names, labelled, normalised } = data;
const has = { good: labelled && kind.includes(0), defects: labelled && kinds.length > 1 };

// Okabe and Ito's colours, which the colour-blind can tell apart; more kinds than colours are hatched
const COLOURS = ["#D55E00", "#E69F00", "#56B4E9", "#CC79A7", "#009E73", "#0072B2", "#F0E442", "#8C6D46"];
const PATTERNS = ["", "/", "\\", "x", "-", "|", "+", "."];
const style = (k) => (k === 0 && (labelled || kinds.length === 1) ? ["#7A8794", ""]
  : [COLOURS[(k + COLOURS.length - 1) % COLOURS.length], PATTERNS[Math.floor((k - 1 + !labelled) / COLOURS.length) % PATTERNS.length]]);

const highest = scores.reduce((a, b) => Math.max(a, b), -Infinity);
const lowest = scores.reduce((a, b) => Math.min(a, b), Infinity);
const initial = data.threshold ?? highest;
const low = normalised ? 0 : Math.min(lowest, initial);
const high = normalised ? 1 : Math.max(highest, initial, low + 1e-6);
const decimals = Math.max(3, Math.ceil(-Math.log10((high - low) / 1000)));
let threshold = initial;
let prevalence = labelled ? kind.filter((k) => k > 0).length / scores.length : null; // share of defects
let dragged = null; // where the line was taken, while it is

const share = (n, of) => (of ? `${(100 * n / of).toFixed(1)} %` : "–");
const some = (n, of) => (of ? `${n.toLocaleString("en")} of ${of.toLocaleString("en")}` : "none tested");
const plural = (n, one, more) => `${n.toLocaleString("en")} ${n === 1 ? one : more}`;
const shown = (value) => {
  const short = String(Number(value.toPrecision(6)));
  return short.length < 5 && !short.includes("e") ? Number(short).toFixed(2) : short;
};
const sum = (list) => list.reduce((a, b) => a + b, 0);
const number = (text) => (text.trim() === "" ? NaN : Number(text.trim().replace(",", "."))); // a comma for a decimal point
const say = (text) => { $("said").textContent = text; };

// the interval of a share by Wilson's score, with 95 % confidence
function wilson(n, of) {
  const z = 1.959964, p = n / of, scale = 1 + z * z / of;
  const middle = (p + z * z / (2 * of)) / scale;
  const half = z * Math.sqrt(p * (1 - p) / of + z * z / (4 * of * of)) / scale;
  return [Math.max(0, middle - half), Math.min(1, middle + half)];
}
const rough = (x) => (100 * x < 0.95 && x > 0 || 100 * x > 99.05 && x < 1 ? (100 * x).toFixed(1) : (100 * x).toFixed(0));
const between = ([a, b]) => `between ${rough(a)} and ${rough(b)} %`;
const range = (n, of) => (of ? between(wilson(n, of)) : "");

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

let printing = false;
const dark = matchMedia("(prefers-color-scheme: dark)");
const theme = () => (dark.matches && !printing ? { ink: "#e8ebee", grid: "#343b43", edge: "#14171a" }
  : { ink: "#1b1f24", grid: "#e6e9ed", edge: "#fff" });
const font = () => ({ family: "system-ui, 'Segoe UI', Roboto, Arial, sans-serif", size: 14, color: theme().ink });
const paper = () => ({ paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", font: font() });
const CONFIG = { displayModeBar: false, responsive: true, doubleClick: false };
const axis = (title, options) => ({
  title: { text: title }, fixedrange: true, gridcolor: theme().grid, zerolinecolor: theme().grid, ...options,
});

// What the chart shows: most of the scores, and the threshold. What lies beyond is one bar at either end.
const BINS = 60;
let view = [low, high], most = null;
function chooseView() {
  const all = $("whole").checked || printing && $("whole").checked;
  const inner = (normalised ? scores.filter((x) => x > 0 && x < 1) : [...scores]).sort((a, b) => a - b);
  if (all || inner.length < 5) return [low, high];
  const at = (share) => inner[Math.min(inner.length - 1, Math.floor(share * inner.length))];
  const ends = [at(0.01), at(0.98), threshold, initial];
  const a = Math.min(...ends), b = Math.max(...ends), pad = 0.06 * (b - a || high - low);
  return [Math.max(low, a - pad), Math.min(high, b + pad)];
}

// numbers of images by kind and bar; the first and the last bar are what lies beyond the view
function binned() {
  const [a, b] = view, bars = kinds.map(() => new Array(BINS + 2).fill(0));
  scores.forEach((x, i) => {
    const place = x < a ? 0 : x > b ? BINS + 1 : Math.min(BINS, 1 + Math.floor((x - a) / (b - a) * BINS));
    bars[kind[i]][place] += 1;
  });
  return bars;
}

function drawHistogram() {
  view = chooseView();
  const size = (view[1] - view[0]) / BINS, bars = binned();
  const total = bars[0].map((_, j) => sum(bars.map((own) => own[j])));
  const sorted = [...total].sort((x, y) => y - x);
  most = sorted[0] > 3 * sorted[1] && sorted[1] > 0 ? 1.3 * sorted[1] : null; // a bar of many is cut off
  const x = total.map((_, j) => view[0] + (j - 0.5) * size);
  const traces = kinds.map((name, k) => {
    const [colour, pattern] = style(k);
    return {
      type: "bar", name, x, y: bars[k], width: size, customdata: x.map((c) => [c - size / 2, c + size / 2].map((e) => e.toFixed(decimals)).join(" to ")),
      marker: { color: colour, pattern: { shape: pattern }, line: { width: 1, color: theme().edge } },
      hovertemplate: `%{customdata}: %{y} %{fullData.name}<extra></extra>`,
    };
  }).filter((trace) => sum(trace.y));
  const notes = total.flatMap((n, j) => (most && n > most ? [{ x: x[j], y: 1, yref: "paper", yanchor: "top", text: `${n} ↑`,
    showarrow: false, bgcolor: dark.matches && !printing ? "#14171a" : "#fff", font: font() }] : []));
  const layout = {
    ...paper(), barmode: "stack", dragmode: false, margin: { l: 48, r: 12, t: 12, b: 44 }, bargap: 0, annotations: notes,
    xaxis: axis("score", { range: [view[0] - size, view[1] + size] }),
    yaxis: axis("images", most ? { range: [0, most] } : { rangemode: "tozero" }),
    showlegend: false, shapes: [line()],
  };
  const first = !$("histogram").data;
  Plotly.react($("histogram"), traces, layout, { ...CONFIG, edits: { shapePosition: true } });
  const beyond = [[total[0], "below", view[0]], [total[BINS + 1], "above", view[1]]].filter(([n]) => n)
    .map(([n, word, end]) => `${plural(n, "image", "images")} ${word} ${end.toFixed(3)}`);
  const ends = normalised ? [0, 1].map((end) => [scores.filter((s) => s === end).length, end]).filter(([n]) => n)
    .map(([n, end]) => `${plural(n, "score is", "scores are")} at the scale's end, ${end}, where higher and lower ones are clipped`
      .replace("higher and lower", end ? "higher" : "lower")) : [];
  $("tails").textContent = [beyond.length && `The bar at the end stands for ${beyond.join(" and ")}.`,
    ends.length && `${ends.join("; ")}.`].filter(Boolean).join(" ");
  if (!first) return;
  if (kinds.length > 1) $("legend").replaceChildren(...kinds.map((name, k) => make("span", {}, swatch(k), name)));
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
    line: { color: theme().ink, width: 3 } };
}

function straight() {
  const { x0, x1, y0, y1 } = $("histogram").layout.shapes[0];
  return x0 === threshold && x1 === threshold && y0 === 0 && y1 === 1;
}

function drawCurve(id, x, y, curve) {
  const range = { range: [-0.02, 1.02], tickformat: ".0%" };
  const layout = {
    ...paper(), dragmode: false, showlegend: false, margin: { l: 60, r: 12, t: 16, b: 48 },
    xaxis: axis(x, range), yaxis: axis(y, range),
  };
  const hovertemplate = `${y} %{y:.1%}<br>${x} %{x:.1%}<extra></extra>`;
  const traces = [
    { ...curve, mode: "lines", line: { color: "#2f8fd6", width: 3 }, hovertemplate, cliponaxis: false },
    { x: [null], y: [null], mode: "markers", hoverinfo: "skip", cliponaxis: false,
      marker: { color: theme().ink, size: 13, line: { color: theme().edge, width: 2 } } },
  ];
  Plotly.react($(id), traces, layout, CONFIG);
}

function drawCharts() {
  drawHistogram();
  if (data.roc) {
    drawCurve("roc", "false rejects", "defects found", data.roc);
    drawCurve("precision-recall", "defects found (recall)", "precision", data.precision_recall);
  }
}

// one kind's scores, small, on the scale of the histogram
function small(bars) {
  const highest = Math.max(...bars, 1), NS = "http://www.w3.org/2000/svg", width = BINS + 2;
  const svg = document.createElementNS(NS, "svg");
  for (const [name, value] of Object.entries({ viewBox: `0 0 ${width} 20`, preserveAspectRatio: "none", class: "small" })) svg.setAttribute(name, value);
  const rect = (x, y, w, h, fill) => {
    const mark = document.createElementNS(NS, "rect");
    for (const [name, value] of Object.entries({ x, y, width: w, height: h, fill })) mark.setAttribute(name, value);
    svg.append(mark);
  };
  return (colour) => {
    bars.forEach((n, j) => { if (n) rect(j, 20 - Math.max(1.5, 20 * n / highest), 1, Math.max(1.5, 20 * n / highest), colour); });
    rect(1 + (threshold - view[0]) / (view[1] - view[0]) * BINS - 0.15, 0, 0.3, 20, "currentColor");
    return svg;
  };
}

// figures

function count(at = threshold) {
  const images = kinds.map(() => 0), rejected = kinds.map(() => 0);
  scores.forEach((score, i) => {
    images[kind[i]] += 1;
    rejected[kind[i]] += score > at;
  });
  return { images, rejected };
}

const precise = (found, wrong) => (prevalence * found + (1 - prevalence) * wrong
  ? prevalence * found / (prevalence * found + (1 - prevalence) * wrong) : null);

function showFigures() {
  const { images, rejected } = count();
  const above = sum(rejected);
  const tell = (id, n, of) => {
    if (!$(id)) return;
    $(id).textContent = some(n, of);
    $(`${id}-share`).textContent = share(n, of);
    $(`${id}-range`).textContent = range(n, of);
  };
  tell("rejected", above, scores.length);
  if (normalised) {
    $("camera").textContent = `--threshold ${shown(threshold)}`;
    $("chosen").textContent = shown(threshold);
  }
  if (kinds.length > 1) {
    const bars = binned();
    $("kinds").replaceChildren(...kinds.map((name, k) => {
      if (!images[k]) return "";
      const cells = [images[k], rejected[k], images[k] - rejected[k]].map((text) => make("td", {}, String(text)));
      const interval = make("td", {}, `${share(rejected[k], images[k])} `, make("i", {}, range(rejected[k], images[k])));
      return make("tr", {}, make("td", {}, swatch(k), name), ...cells, interval, make("td", {}, small(bars[k])(style(k)[0])));
    }).filter(Boolean));
  }
  if (!labelled) {
    $("summary").textContent = `${plural(above, "image", "images")} rejected (${share(above, scores.length)})`;
    return { rejected: above };
  }
  const good = images[0], falseRejects = rejected[0];
  const defects = scores.length - good, found = above - falseRejects, escapes = defects - found;
  tell("false-rejects", falseRejects, good);
  tell("escapes", escapes, defects);
  if (has.defects) {
    $("recall").textContent = share(found, defects);
    $("recall-range").textContent = range(found, defects);
  }
  if (has.good && has.defects) {
    const exact = precise(found / defects, falseRejects / good);
    $("precision").textContent = exact === null || !above ? "–" : share(exact, 1);
    const [fewest, all] = wilson(found, defects), [least, worst] = wilson(falseRejects, good);
    $("precision-range").textContent = above ? between([precise(fewest, worst), precise(all, least)]) : "";
    $("as-tested").hidden = Math.abs(prevalence - defects / scores.length) > 5e-4;
    if (document.activeElement !== $("prevalence")) $("prevalence").value = Number((100 * prevalence).toPrecision(3));
  }
  const parts = [good && plural(falseRejects, "false reject", "false rejects"), defects && plural(escapes, "escape", "escapes")];
  $("summary").textContent = parts.filter(Boolean).join(" · ");
  if (data.roc) {
    Plotly.restyle($("roc"), { x: [[falseRejects / good]], y: [[found / defects]] }, [1]);
    const precision = above ? found / above : 1;
    Plotly.restyle($("precision-recall"), { x: [[found / defects]], y: [[precision]] }, [1]);
  }
  return { rejected: above, "false reject": falseRejects, escape: escapes, mistake: falseRejects + escapes };
}

// presets: the thresholds that part scores, the shortest number between two of them

function short(a, b) { // a <= it < b
  for (let digits = 2; digits < 9; digits += 1) {
    const value = Number(((a + b) / 2).toFixed(digits));
    if (a <= value && value < b) return value;
  }
  return a;
}

function* thresholds() { // with what is rejected of good and defective images
  const order = scores.map((_, i) => i).sort((a, b) => scores[a] - scores[b]);
  let good = labelled ? kind.filter((k) => k === 0).length : scores.length, bad = scores.length - good;
  if (low < scores[order[0]]) yield { at: short(low, scores[order[0]]), good, bad };
  order.forEach((i, j) => {
    if (labelled && kind[i] > 0) bad -= 1; else good -= 1;
    const next = j + 1 < order.length ? scores[order[j + 1]] : null;
    if (next === scores[i]) return;
    pending.push({ at: next === null ? scores[i] : short(scores[i], next), good, bad });
  });
  yield* pending.splice(0);
}
const pending = [];

function preset(name) {
  const all = [...thresholds()], counted = count(low - 1).images;
  const good = labelled ? counted[0] : scores.length, bad = scores.length - good;
  const best = (worth) => all.reduce((a, b) => (worth(b) > worth(a) ? b : a));
  let chosen = null, what = "";
  if (name === "escape") {
    chosen = all.filter((t) => t.bad === bad).at(-1);
    what = "no escape among these";
  } else if (name === "rejects") {
    const most = number($("most").value);
    if (!(most >= 0 && most <= 100)) return say(`“${$("most").value}” is no share: give 0 to 100 per cent`);
    chosen = all.find((t) => t.good <= most / 100 * good + 1e-9);
    what = `at most ${most} % ${labelled ? "false rejects" : "rejected"}`;
  } else if (name === "f1") {
    chosen = best((t) => 2 * t.bad / (bad + t.bad + t.good));
    what = "the best F1";
  } else {
    const [escape, reject] = ["cost-escape", "cost-reject"].map((id) => number($(id).value));
    if (!(escape >= 0 && reject >= 0)) return say("a cost is no number: give 0 or more");
    chosen = best((t) => -(prevalence * (bad - t.bad) / bad * escape + (1 - prevalence) * t.good / good * reject));
    what = `the least cost, with ${shownShare()} % of all parts defective`;
  }
  if (!chosen) return say(`there is no threshold with ${what}: some score as low as the scale goes`);
  setThreshold(chosen.at);
  return say(`${shown(chosen.at)} gives ${what}`);
}
const shownShare = () => Number((100 * prevalence).toPrecision(3));

for (const button of document.querySelectorAll("[data-preset]")) {
  button.addEventListener("click", () => preset(button.dataset.preset));
}
$("presets").addEventListener("submit", (event) => event.preventDefault());
$("presets").addEventListener("keydown", (event) => { // Enter in a field is a click on its button
  if (event.key === "Enter" && event.target.tagName === "INPUT") event.target.closest(".with").querySelector("button").click();
});
$("prevalence")?.addEventListener("change", () => {
  const value = number($("prevalence").value);
  if (value > 0 && value < 100) prevalence = value / 100;
  else say(`“${$("prevalence").value}” is no share of defects: give more than 0 and less than 100 per cent`);
  showFigures();
});

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
const ORDER = {
  nearest: ([a], [b]) => Math.abs(scores[a] - threshold) - Math.abs(scores[b] - threshold) || a - b,
  highest: ([a], [b]) => scores[b] - scores[a] || a - b,
  lowest: ([a], [b]) => scores[a] - scores[b] || b - a,
};
const BATCH = 60;
const cards = new Map();
let limit = BATCH, present = [], viewed = null;
const url = (file) => `data:image/jpeg;base64,${file}`;

function card(picture) {
  const [i, image, map] = picture;
  const button = make("button", { type: "button" }, make("img", { alt: "", src: url(image), decoding: "async" }));
  if (map) button.append(make("img", { alt: "", src: url(map), className: "map", decoding: "async" }));
  // not by :hover, which a tap leaves on
  button.addEventListener("pointerenter", (event) => button.classList.toggle("over", event.pointerType === "mouse"));
  button.addEventListener("pointerleave", () => button.classList.remove("over"));
  button.addEventListener("click", () => look(picture));
  const file = make("span", { className: "name", title: names[i] }, names[i].split("/").pop());
  const score = make("span", { className: "score" }, scores[i].toFixed(decimals));
  const of = make("span", { className: "kind" }, swatch(kind[i]), kinds[kind[i]]);
  const judged = make("span", { className: "verdict" });
  const element = make("li", { className: "card" }, button, make("p", {}, file), make("p", {}, of),
    make("p", {}, score, judged));
  const judge = () => {
    const text = verdict(i);
    judged.textContent = text;
    element.classList.toggle("wrong", text === "false reject" || text === "escape");
    element.classList.toggle("above", scores[i] > threshold);
    button.setAttribute("aria-label", `${names[i]}, ${kinds[kind[i]]}, score ${score.textContent}, ${text}: look closer`);
  };
  return { element, judge };
}

const picked = () => document.querySelector("input[name=show]:checked");
function chosen() {
  const wanted = WANTED[picked().value], of = $("kind")?.value ?? "";
  return pictures.filter(([i]) => wanted(i) && (of === "" || kind[i] === Number(of))).sort(ORDER[$("order").value]);
}

function showGallery() {
  if (!pictures.length) return;
  const all = chosen(), next = all.slice(0, limit);
  $("none").hidden = all.length > 0;
  for (const picture of next) if (!cards.has(picture[0])) cards.set(picture[0], card(picture));
  for (const { judge } of cards.values()) judge();
  if (next.length !== present.length || next.some((picture, j) => picture !== present[j])) {
    $("gallery").replaceChildren(...next.map(([i]) => cards.get(i).element));
    present = next;
  }
  $("images").textContent = printing ? `${labelled ? "All mistakes" : "Rejected images"}: ${plural(all.length, "image", "images")}` : "Images";
}

const atEnd = new IntersectionObserver(([entry]) => {
  if (!entry.isIntersecting || limit > pictures.length) return;
  limit += BATCH;
  showGallery();
  watchEnd();
}, { rootMargin: "600px" });

function watchEnd() { // anew, to be told also of an end that has stayed in sight
  if (!pictures.length) return;
  atEnd.disconnect();
  atEnd.observe($("more"));
}

function showFromStart() {
  limit = BATCH;
  showGallery();
  watchEnd();
}

$("filters")?.addEventListener("change", showFromStart);
$("filters")?.addEventListener("submit", (event) => event.preventDefault());

// one image, larger

function look(picture) {
  viewed = picture;
  const [i, image, map] = picture;
  $("viewer-name").textContent = names[i];
  $("viewer-text").textContent = `${kinds[kind[i]]}, score ${scores[i].toFixed(decimals)}, threshold ${shown(threshold)}: ${verdict(i)}`;
  $("viewer-image").src = url(image);
  $("viewer-map").parentElement.hidden = !map;
  $("viewer-outline").parentElement.hidden = !map || data.pixel_threshold === null;
  if (map) $("viewer-map").src = url(map);
  if (map && data.pixel_threshold !== null) outline(picture);
  if (!$("viewer").open) $("viewer").showModal();
}

async function outline(picture) {
  const [drawn, map] = await Promise.all(picture.slice(1).map((file) => {
    const element = make("img", { src: url(file) });
    return element.decode().then(() => element);
  }));
  if (picture !== viewed) return;
  const canvas = $("viewer-outline"), scale = Math.max(1, Math.round(512 / Math.max(drawn.naturalWidth, drawn.naturalHeight)));
  const [width, height] = [canvas.width, canvas.height] = [drawn.naturalWidth * scale, drawn.naturalHeight * scale];
  const context = canvas.getContext("2d", { willReadFrequently: true });
  context.drawImage(map, 0, 0, width, height);
  const values = context.getImageData(0, 0, width, height).data, cut = 255 * data.pixel_threshold;
  const inside = (x, y) => x >= 0 && y >= 0 && x < width && y < height && values[4 * (y * width + x)] > cut;
  context.drawImage(drawn, 0, 0, width, height);
  for (let y = 0; y < height; y += 1) {
    for (let x = 0; x < width; x += 1) {
      const here = inside(x, y);
      const edge = [[1, 0], [-1, 0], [0, 1], [0, -1]].some(([a, b]) => inside(x + a, y + b) !== here);
      if (!edge) continue;
      context.fillStyle = here ? "#00e5ff" : "#000";
      context.fillRect(x - 1, y - 1, 2, 2);
    }
  }
}

function step(by) {
  const all = chosen(), place = all.indexOf(viewed);
  // one that the filter has taken out is followed by the first
  const next = all[place < 0 ? 0 : Math.min(all.length - 1, Math.max(0, place + by))];
  if (next) look(next);
}

function onlyRejected() {
  const off = picked().value === "rejected";
  document.querySelector(`input[name=show][value=${off ? "all" : "rejected"}]`).checked = true;
  $("only").setAttribute("aria-pressed", String(!off));
  showFromStart();
  if ($("viewer").open && !chosen().includes(viewed)) step(0);
}

if (pictures.length) {
  $("previous").addEventListener("click", () => step(-1));
  $("next").addEventListener("click", () => step(1));
  $("only").addEventListener("click", onlyRejected);
}
$("close").addEventListener("click", () => $("viewer").close());
$("viewer").addEventListener("click", (event) => { if (event.target === $("viewer")) $("viewer").close(); });
$("viewer").addEventListener("close", () => cards.get(viewed[0])?.element.querySelector("button").focus());
addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || ["INPUT", "SELECT"].includes(event.target.tagName) || !pictures.length) return;
  if (event.key === "r") onlyRejected();
  if (!$("viewer").open) return;
  if (event.key === "ArrowLeft") step(-1);
  if (event.key === "ArrowRight") step(1);
});

// the threshold, which has three handles

function moveTo(value) {
  setThreshold(Number(value.toFixed(decimals)));
}

let waiting = false;
function setThreshold(value) {
  threshold = Math.min(high, Math.max(low, value));
  say("");
  if (!waiting) requestAnimationFrame(show);
  waiting = true;
}

function show() {
  waiting = false;
  if (document.activeElement !== $("number") || number($("number").value) !== threshold) $("number").value = shown(threshold);
  $("slider").value = threshold;
  if (!dragged && (threshold < view[0] || threshold > view[1])) drawHistogram();
  if (!dragged && !straight()) Plotly.relayout($("histogram"), { shapes: [line()] });
  const counts = { all: scores.length, ...showFigures() };
  for (const input of document.querySelectorAll("input[name=show]")) {
    input.nextElementSibling.textContent = counts[input.value].toLocaleString("en");
  }
  showGallery();
}

Object.assign($("slider"), { min: low, max: high, step: 10 ** -decimals });
$("slider").addEventListener("input", () => moveTo(Number($("slider").value)));
$("number").addEventListener("change", () => {
  const value = number($("number").value);
  if (Number.isNaN(value)) {
    say(`“${$("number").value}” is no number: the threshold stays`);
    $("number").value = shown(threshold);
    return;
  }
  $("number").value = $("number").value.trim().replace(",", ".");
  setThreshold(value);
  if (value !== threshold) say(`${value} is beyond the scores: the threshold is ${shown(threshold)}, the ${value > threshold ? "highest" : "lowest"} that there is`);
});
$("number").addEventListener("keydown", (event) => {
  const by = { ArrowUp: 1, ArrowDown: -1 }[event.key];
  if (!by) return;
  event.preventDefault();
  moveTo(threshold + by * 10 ** -decimals);
});
$("reset").addEventListener("click", () => setThreshold(initial));
$("whole").addEventListener("change", () => {
  drawHistogram();
  showFigures();
});

// the decision, and paper

function decision() {
  return { threshold: Number(shown(threshold)), who: $("who").value.trim(), why: $("why").value.trim(),
    when: new Date().toISOString(), of: data.title, checkpoint: data.checkpoint };
}

if (normalised) {
  $("decision").addEventListener("submit", (event) => event.preventDefault());
  $("save").addEventListener("click", () => {
    const made = decision(), missing = ["who", "why"].find((name) => !made[name]);
    if (missing) {
      say(`The decision lacks ${missing}: say it`);
      $(missing).focus();
      return;
    }
    const link = make("a", { download: "decision.json",
      href: URL.createObjectURL(new Blob([`${JSON.stringify(made, null, 2)}\n`], { type: "application/json" })) });
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 10000);
    say(`decision.json is saved: threshold ${made.threshold}`);
  });
  $("print").addEventListener("click", () => print());
  for (const [from, to] of [["who", "signed"], ["why", "reason"]]) {
    $(from).addEventListener("input", () => { $(to).textContent = $(from).value; });
  }
}

let before = null;
addEventListener("beforeprint", () => {
  printing = true;
  before = { whole: $("whole").checked, show: picked?.()?.value, limit };
  $("whole").checked = true;
  const wanted = labelled ? "mistake" : "rejected";
  if (pictures.length) document.querySelector(`input[name=show][value="${wanted}"]`).checked = true;
  limit = Infinity;
  drawCharts();
  for (const chart of document.querySelectorAll(".chart")) {
    Plotly.relayout(chart, { width: chart.id === "histogram" ? 700 : 340, height: chart.id === "histogram" ? 220 : 240 });
  }
  show();
});
addEventListener("afterprint", () => {
  printing = false;
  $("whole").checked = before.whole;
  if (pictures.length) document.querySelector(`input[name=show][value="${before.show}"]`).checked = true;
  limit = before.limit;
  drawCharts();
  for (const chart of document.querySelectorAll(".chart")) Plotly.relayout(chart, { width: null, height: null, autosize: true });
  show();
});
dark.addEventListener("change", () => {
  drawCharts();
  show();
});

drawCharts();
show();
watchEnd();
