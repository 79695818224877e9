"use strict";
// The store and its sequences. The data of the store are JSON and go into the page as text
// nodes, never as markup.
const data = JSON.parse(document.getElementById("data").textContent);
const at = (id) => document.getElementById(id);
const MARKS = { " ": "\u00b7", "\n": "\u21b5", "\t": "\u21e5" };
const LEVELS = data.scale.levels;

function make(name, className, ...children) {
  const element = document.createElement(name);
  if (className) element.className = className;
  element.append(...children);
  return element;
}

const text = (token) => data.texts[token];

function paint(element, [, , surprise]) {
  const level = Math.min(LEVELS - 1, Math.max(0, Math.floor(surprise / data.scale.step)));
  element.style.setProperty("--colour", `var(--s${level})`);
}

function percent(probability) {
  const share = 100 * probability;
  if (share >= 10) return share.toFixed(1) + "%";
  if (share >= 0.01) return share.toFixed(2) + "%";
  if (share >= 0.001) return share.toFixed(3) + "%";
  return share > 0 ? "<0.001%" : "0%";
}

/** A token with its blanks and line ends seen. */
function visible(token) {
  const parts = [];
  for (const letter of text(token)) {
    parts.push(letter in MARKS ? make("span", "mark", MARKS[letter]) : letter);
  }
  return parts;
}

/** A token as it stands in running text; a line end is seen and obeyed. */
function running(token) {
  const parts = [];
  text(token).split("\n").forEach((line, place) => {
    if (place) parts.push(make("span", "mark", MARKS["\n"]), "\n");
    if (line) parts.push(line);
  });
  return parts;
}

// ---- the store ----

function drawStore() {
  document.title = data.title + " - coldstill inspect";
  at("title").textContent = data.title;
  at("note").textContent = data.note;
  at("note").hidden = !data.note;
  for (const [name, value] of data.table) {
    at("table").append(make("dt", "", name), make("dd", "", value));
  }
  for (const one of data.histograms) at("histograms").append(drawHistogram(one));
  for (let i = 0; i < LEVELS; i++) {
    const nats = i * data.scale.step;
    const shown = i === LEVELS - 1 ? nats + "+" : nats % 2 === 0 ? String(nats) : "";
    const swatch = make("span", "", shown);
    swatch.style.background = `var(--s${i})`;
    swatch.title = `-log p from ${nats} nats: p up to ${percent(Math.exp(-nats))}`;
    at("scale").append(swatch);
  }
}

function svg(name, attributes, content) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  if (content !== undefined) element.textContent = content;
  return element;
}

function drawHistogram({ title, counts, bins, ticks, mean, meanLabel }) {
  const width = 400, height = 84, most = Math.max(1, ...counts);
  const total = counts.reduce((sum, count) => sum + count, 0);
  const step = width / counts.length;
  const picture = svg("svg", { viewBox: `0 -12 ${width} ${height + 28}`, role: "img" });
  picture.setAttribute("aria-label", `${title}; ${meanLabel}`);
  counts.forEach((count, i) => {
    if (!count) return;
    const tall = Math.max(1, (height * count) / most);
    const left = i * step + 0.75;
    const bar = svg("rect", { x: left, y: height - tall, width: step - 1.5, height: tall });
    const share = percent(count / total);
    bar.append(svg("title", {}, `${bins[i]}: ${count.toLocaleString("en")} positions, ${share}`));
    picture.append(bar);
  });
  const floor = height + 0.5;
  picture.append(svg("line", { x1: 0, x2: width, y1: floor, y2: floor, class: "axis" }));
  for (const [place, label] of ticks) {
    const anchor = place === 0 ? "start" : place === 1 ? "end" : "middle";
    picture.append(svg("text", { x: place * width, y: height + 14, "text-anchor": anchor }, label));
  }
  const x = mean * width;
  const [anchor, gap] = mean > 0.7 ? ["end", -4] : ["start", 4];
  const label = { x: x + gap, y: -3, class: "mean", "text-anchor": anchor };
  picture.append(svg("line", { x1: x, x2: x, y1: -10, y2: height, class: "mean" }));
  picture.append(svg("text", label, meanLabel));
  return make("figure", "", make("figcaption", "", title), picture);
}

// ---- the sequences ----

const tokens = []; // every token of the page: {element, sequence, place, prediction}

function drawSequence(sequence) {
  const predictions = new Map(sequence.predictions.map((b) => [b[0], b]));
  const borders = new Map(sequence.documents);
  const section = make("section", "");
  const box = make("div", "text");
  box.setAttribute("role", "listbox");
  box.setAttribute("aria-label", `Tokens of sequence ${sequence.row}`);
  let surprise = 0, count = 0;
  sequence.tokens.forEach((token, i) => {
    const place = sequence.first + i;
    if (borders.has(place)) box.append(make("div", "border", `document ${borders.get(place)}`));
    else if (i === 0) box.append(make("div", "border", `from position ${place}`));
    const prediction = predictions.get(place);
    const element = make("span", prediction ? "t" : "t none", ...running(token));
    if (prediction) {
      paint(element, prediction);
      surprise += prediction[2];
      count += 1;
    }
    element.setAttribute("role", "option");
    element.tabIndex = -1;
    element.dataset.index = tokens.length;
    tokens.push({ element, sequence, place, token, prediction });
    box.append(element);
  });
  const facts = [`number ${sequence.id} of its corpus`, `${sequence.length} tokens`];
  if (count) facts.push(`mean surprise ${(surprise / count).toFixed(2)} nats`);
  section.append(
    make("h2", "", `Sequence ${sequence.row}`, make("small", "", facts.join(" \u00b7 "))), box);
  at("sequences").append(section);
  at("go").append(new Option(sequence.row));
}

function go() {
  at("sequences").children[at("go").selectedIndex - 1].scrollIntoView();
  at("go").selectedIndex = 0; // where the reader is changes with every scroll
}
