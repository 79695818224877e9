"use strict";
// Everything of the store comes as JSON and goes into the page as text nodes, never as markup.
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
  for (const [name, value] of data.table) at("table").append(make("dt", "", name), make("dd", "", value));
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
    const bar = svg("rect", { x: i * step + 0.75, y: height - tall, width: step - 1.5, height: tall });
    const share = percent(count / total);
    bar.append(svg("title", {}, `${bins[i]}: ${count.toLocaleString("en")} positions, ${share}`));
    picture.append(bar);
  });
  picture.append(svg("line", { x1: 0, x2: width, y1: height + 0.5, y2: height + 0.5, class: "axis" }));
  for (const [place, label] of ticks) {
    const anchor = place === 0 ? "start" : place === 1 ? "end" : "middle";
    picture.append(svg("text", { x: place * width, y: height + 14, "text-anchor": anchor }, label));
  }
  const x = mean * width;
  const anchor = mean > 0.7 ? "end" : "start";
  picture.append(svg("line", { x1: x, x2: x, y1: -10, y2: height, class: "mean" }));
  picture.append(svg("text", { x: x + (anchor === "end" ? -4 : 4), y: -3, class: "mean", "text-anchor": anchor }, meanLabel));
  return make("figure", "", make("figcaption", "", title), picture);
}

// ---- the sequences ----

const tokens = []; // every token of the page: {element, sequence, place, belief}

function drawSequence(sequence) {
  const beliefs = new Map(sequence.beliefs.map((b) => [b[0], b]));
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
    const belief = beliefs.get(place);
    const element = make("span", belief ? "t" : "t none", ...running(token));
    if (belief) {
      paint(element, belief);
      surprise += belief[2];
      count += 1;
    }
    element.setAttribute("role", "option");
    element.tabIndex = -1;
    element.dataset.index = tokens.length;
    tokens.push({ element, sequence, place, token, belief });
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

// ---- what the teacher expected ----

function drawHint() {
  at("belief").replaceChildren(
    make("p", "hint", "Point at a token, tap it, or press an arrow key: here stands what the " +
      "teacher expected in its place, before it had read it."));
}

function drawBelief(index) {
  const one = tokens[index];
  const badge = make("span", "t", ...visible(one.token));
  if (one.belief) paint(badge, one.belief);
  const title = make("h3", "", badge);
  const where = make("p", "soft", `token ${one.place} of sequence ${one.sequence.row}, id ${one.token}`);
  at("belief").replaceChildren(title, where, ...(one.belief ? drawTarget(one, index) : [drawNone(one)]));
}

function drawNone(one) {
  return make("p", "hint", startsDocument(one)
    ? "A document begins here: there is nothing before it to expect it from."
    : "Read by the teacher, but not to be learned (of a prompt, say): nothing is stored.");
}

function drawTarget(one, index) {
  const [, position, surprise, entropy, rank, headMass, tailMass, head, samples] = one.belief;
  const p = Math.exp(-surprise);
  const context = make("p", "context", ...readBefore(one, index, position), " ", make("b", "", "?"));
  const how = make("p", "soft how", `What the teacher expected here, before reading it. Stored at position ${position}, after the text`);
  const numbers = make("dl", "numbers");
  const shown = [["probability", percent(p)], ["surprise", surprise.toFixed(2), " nats"],
    ["entropy", entropy.toFixed(2), " nats"], ["rank", rank || (data.head ? `> ${data.head}` : "\u2013")]];
  for (const [name, value, unit] of shown) {
    numbers.append(make("dt", "", name), make("dd", "", String(value), make("small", "", unit || "")));
  }
  return [how, context, numbers, drawBest(one, head, rank, p, headMass, tailMass),
    ...drawSamples(samples, tailMass)];
}

/** The last tokens of the document up to a position. */
function readBefore(one, index, position) {
  const before = [];
  for (let i = index - 1; i >= 0 && before.length < 8; i--) {
    const other = tokens[i];
    if (other.sequence !== one.sequence || other.place > position) break;
    before.unshift(make("span", "", ...visible(other.token)));
    if (startsDocument(other)) return before;
  }
  return ["\u2026", ...before];
}

const startsDocument = (one) => one.sequence.documents.some(([start]) => start === one.place);

function drawBest(one, head, rank, p, headMass, tailMass) {
  const list = make("ol", "best");
  const row = (word, share, className) => {
    const fill = make("div", "fill");
    fill.style.width = `${100 * share}%`;
    list.append(make("li", className, make("span", "word", ...word), make("div", "track", fill),
      make("span", "share", percent(share))));
  };
  let listed = 0;
  for (let i = 0; i < head.length; i += 2) {
    listed += head[i + 1];
    row(visible(head[i]), head[i + 1], head[i] === one.token ? "label" : "");
  }
  if (!rank || 2 * rank > head.length) row(visible(one.token), p, "label cut");
  const others = data.head - head.length / 2;
  if (others > 0) row([`${others} more of head`], Math.max(0, headMass - listed), "rest cut");
  row([data.head ? "tail" : "all tokens"], tailMass, others > 0 ? "rest" : "rest cut");
  return list;
}

function drawSamples(samples, tailMass) {
  if (!samples.length) return [];
  const drawn = make("p", "");
  let count = 0;
  for (let i = 0; i < samples.length; i += 2) {
    count += samples[i + 1];
    const often = samples[i + 1] > 1 ? [make("i", "", `\u00d7${samples[i + 1]}`)] : [];
    drawn.append(make("span", "", ...visible(samples[i]), ...often), " ");
  }
  const told = `${count} samples of the tail, each standing for ${percent(tailMass / count)}`;
  return [make("div", "samples", make("p", "soft", told), drawn)];
}

// ---- pointing, tapping, keys ----

let opened = -1;

const indexOf = (target) => {
  const element = target instanceof Element ? target.closest(".text .t") : null;
  return element ? Number(element.dataset.index) : -1;
};

function open(index) {
  if (opened >= 0) {
    const old = tokens[opened].element;
    old.classList.remove("open");
    old.tabIndex = -1;
    old.removeAttribute("aria-selected");
  }
  opened = index;
  document.body.classList.toggle("open", index >= 0);
  if (index < 0) {
    tokens[0].element.tabIndex = 0;
    return drawHint();
  }
  const element = tokens[index].element;
  element.classList.add("open");
  element.tabIndex = 0;
  element.setAttribute("aria-selected", "true");
  element.focus({ preventScroll: true });
  drawBelief(index);
  element.scrollIntoView({ block: "nearest" });
}

/** The token nearest to this one on the next line up or down. */
function vertical(index, direction) {
  const from = tokens[index].element.getClientRects()[0];
  let best = -1, line = null, distance = Infinity;
  for (let i = index + direction; i >= 0 && i < tokens.length; i += direction) {
    const box = tokens[i].element.getClientRects()[0];
    if (!box || Math.abs(box.top - from.top) < 4) continue;
    if (line === null) line = box.top;
    if (Math.abs(box.top - line) > 4) break;
    const away = Math.abs(box.left - from.left);
    if (away < distance) [best, distance] = [i, away];
  }
  return best < 0 ? index : best;
}

function follow(event) {
  if (event.altKey || event.ctrlKey || event.metaKey || event.shiftKey) return;
  if (document.activeElement === at("go")) return;
  const inText = indexOf(document.activeElement) >= 0;
  const last = tokens.length - 1;
  let next = -1;
  if (event.key === "Escape") {
    if (opened >= 0) tokens[opened].element.blur();
    open(-1);
  } else if (event.key === "ArrowRight") next = Math.min(last, opened + 1);
  else if (event.key === "ArrowLeft") next = Math.max(0, opened - 1);
  else if (!inText || opened < 0) return;
  else if (event.key === "ArrowDown") next = vertical(opened, 1);
  else if (event.key === "ArrowUp") next = vertical(opened, -1);
  else if (event.key === "Home" || event.key === "End") {
    const row = tokens[opened].sequence;
    const inside = tokens.map((t, i) => (t.sequence === row ? i : -1)).filter((i) => i >= 0);
    next = event.key === "Home" ? inside[0] : inside[inside.length - 1];
  } else return;
  event.preventDefault();
  if (next >= 0) open(next);
}

drawStore();
data.sequences.forEach(drawSequence);
at("go").hidden = data.sequences.length < 2;
at("go").addEventListener("change", go);
open(-1);
const main = at("sequences");
main.addEventListener("click", (event) => {
  const index = indexOf(event.target);
  if (index >= 0) open(index);
});
main.addEventListener("focusin", (event) => {
  const index = indexOf(event.target);
  if (index >= 0 && index !== opened) open(index);
});
main.addEventListener("pointerover", (event) => {
  const index = indexOf(event.target);
  if (event.pointerType === "mouse" && index >= 0) drawBelief(index);
});
main.addEventListener("pointerleave", () => (opened >= 0 ? drawBelief(opened) : drawHint()));
document.addEventListener("keydown", follow);
at("close").addEventListener("click", () => open(-1));
