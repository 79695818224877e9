"""The page of a comparison: what it draws, what it leaves out, and what names cannot do to it."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from typing import TYPE_CHECKING, Any

import pytest
from coldstill.pipeline.pages.compare.figures import best as best_of
from coldstill.pipeline.pages.compare.page import page
from coldstill.pipeline.pages.compare.plots import make_plots
from coldstill.pipeline.recipe.run_folder import Run
from coldstill.pipeline.results.columns import COST, QUALITY
from coldstill.pipeline.results.curves import MOST_POINTS, averaged, in_words, read_curves
from coldstill.pipeline.steps.comparison import compare
from compared import Made, label_loss_at, write_run

if TYPE_CHECKING:
    from pathlib import Path

    from coldstill.pipeline.results.columns import Row

TITLES = [
    "Learning curves", "Loss against size", "Loss against bytes cached", "Calibration",
    "Each student's own objective",
]  # fmt: skip
SMALL = Made(name="small", steps=40)
STUDENTS = [SMALL, Made(name="bare", loss=5.5, cached=0.0), Made(name="deep", parameters=9_000_000)]


def compared(*folders: Path) -> tuple[list[Row], list[Run]]:
    runs = [Run(folder) for folder in folders]
    return compare(runs), runs


def plots_of(*folders: Path) -> dict[str, Any]:
    rows, runs = compared(*folders)
    return {plot.title: plot for plot in make_plots(rows, read_curves(runs))}


def html_of(*folders: Path) -> str:
    rows, runs = compared(*folders)
    return page(rows, read_curves(runs), [str(run.root) for run in runs])


def best(rows: list[Row]) -> set[tuple[int, str]]:
    return best_of((*QUALITY, *COST), rows)


class Tags(HTMLParser):
    """Every tag with its attributes, and whether all are closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_every_student_is_in_every_plot(tmp_path: Path) -> None:
    plots = plots_of(write_run(tmp_path, "a", STUDENTS))
    assert list(plots) == TITLES
    for plot in plots.values():
        drawn = {one.name for panel in plot.panels for one in panel.chart.series}
        assert drawn >= {student.name for student in STUDENTS}, plot.title
        assert "Left out" not in plot.caption
        for panel in plot.panels:
            assert all(s.name in panel.chart.label or not s.marks for s in panel.chart.series)
    looks = {
        (one.name, one.look)
        for plot in plots.values() for panel in plot.panels for one in panel.chart.series
    }  # fmt: skip
    assert len(looks) == 1 + len(STUDENTS)  # one look a model, the same everywhere


def test_points_are_the_figures(tmp_path: Path) -> None:
    plots = plots_of(write_run(tmp_path, "a", STUDENTS))
    (size,), (cached,) = plots[TITLES[1]].panels, plots[TITLES[2]].panels
    points = {one.name: one.points for one in size.chart.series}
    assert points["deep"] == ((9_000_000, 5.0),)
    assert points["teacher"] == ((34_588_160, 4.9),)
    assert {one.name: one.points for one in cached.chart.series} == {
        "small": ((42.3, 5.0),), "bare": ((0.0, 5.5),), "deep": ((42.3, 5.0),),
    }  # fmt: skip
    assert [(level.name, level.value) for level in cached.chart.levels] == [("teacher", 4.9)]
    panel = plots[TITLES[3]].panels[0]
    student, teacher = panel.chart.series
    assert len(student.points) == 21 - 2  # two bins are empty
    assert all(y == pytest.approx(x**1.2) for x, y in student.points)
    assert teacher.look is None
    assert sum(panel.chart.bars.shares) == pytest.approx(1.0)


def test_a_learning_curve_is_over_tokens_and_says_how_it_was_averaged(tmp_path: Path) -> None:
    long = Made(name="long", steps=3 * MOST_POINTS + 1, batch_tokens=5000)
    folder = write_run(tmp_path, "a", [SMALL, long])
    curves = read_curves([Run(folder)])
    small, other = curves["small"], curves["long"]
    assert small.lines == 1
    expected = [(4096.0 * step, label_loss_at(SMALL, step)) for step in range(1, 41)]
    assert [xy for point in small.label_loss for xy in point] == pytest.approx(
        [xy for point in expected for xy in point]
    )
    assert other.lines == 4
    assert len(other.label_loss) == 61
    # 5,000 tokens are four whole sequences of 1,024
    assert other.label_loss[0][0] == 4096 * 2.5
    first = sum(label_loss_at(long, step) for step in range(1, 5)) / 4
    assert other.label_loss[0][1] == pytest.approx(first)
    assert small.objective[0][1] == pytest.approx(label_loss_at(SMALL, 1) - 2)
    assert (small.asked, curves["long"].asked) == ("kl", "kl")
    captions = {name: plot.caption for name, plot in plots_of(folder).items()}
    assert "mean of up to 4 neighbouring lines" in captions[TITLES[0]]
    alone = plots_of(write_run(tmp_path, "b", [SMALL]))[TITLES[0]].caption
    assert "nothing is smoothed" in alone


def test_means_count_every_line_once_and_leave_out_what_is_no_number() -> None:
    places, values = [1, 2, 3, 4, 5], [1.0, 3.0, None, "x", 8]
    assert averaged(places, values, 2) == ((1.5, 2.0), (5.0, 8.0))
    assert averaged(places, [None] * 5, 2) == ()


@pytest.mark.parametrize(
    ("objective", "words"),
    [
        ({"kl": 1.0, "cross_entropy": 0.0}, "kl"),
        ({"kl": 0.5, "jsd": 2, "beta": 0.3, "skew": None}, "0.5 kl, 2 jsd, beta 0.3"),
        ({"kl": {"weight": 0.9, "schedule": "wsd"}}, "0.9 kl (wsd)"),
        ({"kl": 1.0, "temperature": 2.0}, "kl, at temperature 2.0"),
        (None, ""),
    ],
)
def test_an_objective_is_told_in_words(objective: Any, words: str) -> None:
    assert in_words(objective) == words


def test_a_steep_beginning_is_cut_off_and_that_is_said(tmp_path: Path) -> None:
    steep = write_run(tmp_path, "a", [Made(name="s", steps=400)])
    plot = plots_of(steep)[TITLES[0]]
    assert plot.panels[0].chart.y.high < 8.0
    assert "Of the first 10% of the training" in plot.caption
    flat = plots_of(write_run(tmp_path, "b", [Made(name="s", steps=3)]))[TITLES[0]]
    assert flat.panels[0].chart.y.high is None
    assert "cut off" not in flat.caption


def test_what_an_older_version_did_not_measure_is_named(tmp_path: Path) -> None:
    old = [Made(name="old", old=True), Made(name="bare", old=True, cached=0.0)]
    folder = write_run(tmp_path, "a", [SMALL, *old])
    (folder / "students" / "bare" / "metrics.jsonl").write_text(
        '{"step": 1, "loss": 5.0, "cross_entropy": 5.0}\n{"step": 2, "lo', encoding="utf-8"
    )
    plots = plots_of(folder)
    for title, lost in zip(TITLES, ("old", "", "bare, old", "bare, old", ""), strict=True):
        said = re.findall(r"Left out: (.*) \(", plots[title].caption)
        assert said == ([lost] if lost else [])
    curves = {one.name: one.points for one in plots[TITLES[0]].panels[0].chart.series}
    assert curves["bare"] == ((4096.0, 5.0),)  # cross-entropy is the same figure
    for student in ("small", "old", "bare"):
        (folder / "students" / student / "metrics.jsonl").unlink()
    text = html_of(folder)
    assert text.count("Nothing of this is known.") == 2


def test_the_best_student_of_a_column_is_marked_where_figures_compare(tmp_path: Path) -> None:
    rows, _ = compared(write_run(tmp_path, "a", STUDENTS))
    numbers = {row["name"]: number for number, row in enumerate(rows)}
    small, bare, deep = (numbers[name] for name in ("small", "bare", "deep"))
    marked = best(rows)
    assert {(small, "loss"), (deep, "loss"), (small, "parameters"), (bare, "bytes")} <= marked
    assert (bare, "cached_bytes_per_position") in marked
    assert (bare, "loss") not in marked
    assert not any(key == "ece" for _, key in marked)  # all are alike
    assert not any(rows[number]["role"] == "teacher" for number, _ in marked)
    rows[small]["machine"] = "another"
    timed = {column.key for column in COST if column.of == "machine"}
    assert timed & {key for _, key in marked}
    assert not timed & {key for _, key in best(rows)}
    rows[small]["heldout"] = "another"
    assert {key for _, key in best(rows)} == {
        "parameters", "bytes", "cached_bytes_per_position", "flops_per_token",
    }  # fmt: skip
    assert best(rows[:2]) == set()


def test_the_page_needs_nothing_and_holds_together(tmp_path: Path) -> None:
    text = html_of(write_run(tmp_path, "a", STUDENTS), write_run(tmp_path, "b", [SMALL]))
    tags = Tags(text[text.index("<html") :])
    assert tags.open == []
    names = {tag for tag, _ in tags.tags}
    assert not names & {"script", "img", "link", "iframe", "object", "form"}
    for _, attributes in tags.tags:
        assert not {"style", "src", "href"} & attributes.keys()
        assert not any(name.startswith("on") for name in attributes)
    policy = next(a["content"] for _, a in tags.tags if "http-equiv" in a)
    assert policy is not None
    assert policy.startswith("default-src 'none'; base-uri 'none'; form-action 'none'; style-src")
    assert "unsafe" not in policy
    pictures = [a for tag, a in tags.tags if tag == "svg" and a.get("class") == "chart"]
    assert all(a.get("aria-label") or a.get("aria-hidden") for a in pictures)
    assert text.count("<h2>") == 2 + len(TITLES)
    assert len(text.encode()) < 200_000


def test_hostile_names_stay_text(tmp_path: Path) -> None:
    evil = "<img src=x onerror=alert(1)>&amp;@@TABLE@@'\""
    folder = write_run(tmp_path, evil, [SMALL])
    other = write_run(tmp_path, "b", [SMALL])
    settings = folder / "students" / "small" / "student.json"
    recorded = json.loads(settings.read_text(encoding="utf-8"))
    recorded["student"]["objective"] = {"</p><script>": 1.0}
    settings.write_text(json.dumps(recorded), encoding="utf-8")
    figures = folder / "students" / "small" / "evaluation.json"
    changed = {**json.loads(figures.read_text(encoding="utf-8")), "machine": "<b>", "name": "<i>"}
    figures.write_text(json.dumps(changed), encoding="utf-8")
    text = html_of(folder, other)
    tags = Tags(text[text.index("<html") :])
    assert tags.open == []
    assert not {"img", "script", "b", "i"} & {tag for tag, _ in tags.tags}
    assert text.count("@@TABLE@@") > 3
    assert "&lt;img src=x onerror=alert(1)&gt;&amp;amp;" in text


def test_damaged_metrics_and_settings_only_cost_their_plots(tmp_path: Path) -> None:
    folder = write_run(tmp_path, "a", [SMALL])
    for name, content in (("metrics.jsonl", "\xff[]{}"), ("student.json", "[1")):
        (folder / "students" / "small" / name).write_bytes(content.encode("latin-1"))
    (folder / "recipe.resolved.json").write_text("{}", encoding="utf-8")
    assert "Nothing of this is known." in html_of(folder)
