"""JavaScript that measures a page in a browser, for tests of pages."""

from __future__ import annotations

CONTRAST = """elements => {
  const channel = c => (c /= 255) <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
  const luminance = rgb => { const [r, g, b] = rgb.match(/[\\d.]+/g).map(Number).map(channel);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
  const below = e => { const own = getComputedStyle(e).backgroundColor;
    return own.startsWith("rgba(0, 0, 0, 0") ? below(e.parentElement) : own; };
  return elements.map(e => {
    const svg = e.namespaceURI.endsWith("svg"), style = getComputedStyle(e);
    const own = !svg ? style.color : style.fill === "none" ? style.stroke : style.fill;
    const pair = [luminance(own), luminance(below(e))].sort((a, b) => b - a);
    return (pair[0] + 0.05) / (pair[1] + 0.05);
  });
}"""
"""Contrast of each element with the paper below it."""

SCALES = """all => all.filter(s => s.getBoundingClientRect().width > 0)
  .map(s => s.getBoundingClientRect().width / s.viewBox.baseVal.width)"""
"""Scale of each visible picture; letters are 12 pixels at scale 1."""

SHOWN = """sections => sections.map(s => [...s.querySelectorAll("title")]
  .filter(t => t.parentElement.getBoundingClientRect().width > 0)
  .map(t => t.textContent.split(": ")[0]))"""
"""Names of the models with a visible line or mark, section by section."""

COVERED = """all => all.flatMap(svg => {
  const names = [...svg.querySelectorAll(".mark-text.role-mark text")]
    .filter(t => t.getBBox().width > 0);
  const boxes = names.map(t => t.getBoundingClientRect());
  const picture = svg.getBoundingClientRect(), wrong = [];
  boxes.forEach((a, i) => {
    if (a.left < picture.left - 1 || a.right > picture.right + 1)
      wrong.push("outside: " + names[i].textContent);
    for (const b of boxes.slice(i + 1))
      if (Math.min(a.right, b.right) - Math.max(a.left, b.left) > 1 &&
          Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top) > 3)
        wrong.push("covered: " + names[i].textContent);
  });
  return wrong;
})"""
"""Names in pictures that leave their picture or cover another name."""

MARKS = ".mark-symbol.role-mark path[fill], .swatch .mark"
"""Filled marks of plots and legends."""
