// The panel: what the teacher expected in the place of a token; pointing, tapping and keys.

function drawHint() {
  at("prediction").replaceChildren(
    make("p", "hint", "Point at a token, tap it, or press an arrow key: this panel shows what " +
      "the teacher expected in its place."));
}

function drawPrediction(index) {
  const one = tokens[index];
  const badge = make("span", "t", ...visible(one.token));
  if (one.prediction) paint(badge, one.prediction);
  const title = make("h3", "", badge);
  const where = `token ${one.place} of sequence ${one.sequence.row}, id ${one.token}`;
  const rest = one.prediction ? drawTarget(one, index) : [drawNone(one)];
  at("prediction").replaceChildren(title, make("p", "soft", where), ...rest);
}

function drawNone(one) {
  return make("p", "hint", startsDocument(one)
    ? "A document, or a piece of one, begins here: no text before it predicts it."
    : "This token is not learned, for example because it belongs to a prompt: nothing is stored.");
}

function drawTarget(one, index) {
  const [, position, surprise, entropy, rank, headMass, tailMass, head, samples] = one.prediction;
  const p = Math.exp(-surprise);
  const how = "What the teacher expected here, before reading it. " +
    `Stored at position ${position}, after the text`;
  const before = readBefore(one, index, position);
  const numbers = make("dl", "numbers");
  for (const [name, value, unit] of [
    ["probability", percent(p), ""],
    ["surprise", surprise.toFixed(2), " nats"],
    ["entropy", entropy.toFixed(2), " nats"],
    ["rank", String(rank || (data.head ? `> ${data.head}` : "\u2013")), ""],
  ]) numbers.append(make("dt", "", name), make("dd", "", value, make("small", "", unit)));
  return [make("p", "soft how", how),
    make("p", "context", ...before, " ", make("b", "", "?")),
    numbers,
    drawBest(one, head, rank, p, headMass, tailMass),
    ...drawSamples(samples, tailMass), ...drawRounding(head, rank, p)];
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
  if (others > 0) row(["rest of head"], Math.max(0, headMass - listed), "rest cut");
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
  const explanation = `${count} samples of the tail, each standing for ${percent(tailMass / count)}`;
  return [make("div", "samples", make("p", "soft", explanation), drawn)];
}

/** The label's probability is stored beside the head, too; a codec rounds both differently. */
function drawRounding(head, rank, p) {
  if (!rank || 2 * rank > head.length) return [];
  const [own, listed] = [percent(p), percent(head[2 * rank - 1])];
  if (own === listed) return [];
  return [make("p", "soft rounded", `Rounded by the codec: the probability of the label is stored ` +
    `as ${own}, its entry in the head as ${listed}.`)];
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
  drawPrediction(index);
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
  if (event.pointerType === "mouse" && index >= 0) drawPrediction(index);
});
main.addEventListener("pointerleave", () => (opened >= 0 ? drawPrediction(opened) : drawHint()));
document.addEventListener("keydown", follow);
at("close").addEventListener("click", () => open(-1));
