"""The page of a comparison: what it draws, what it leaves out, and hostile names."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from coldstill.pipeline.pages.compare.page import best as best_of
from coldstill.pipeline.pages.compare.page import main, page
from coldstill.pipeline.pages.compare.plots import make_plots
from coldstill.pipeline.recipe.run_folder import Run
from coldstill.pipeline.results.curves import MOST_POINTS, averaged, in_words, read_curves
from coldstill.pipeline.results.model_tables import COST, QUALITY
from coldstill.pipeline.results.rows import compared_rows
from compared import CACHED, Made, label_loss_at, write_run
from html_tags import Tags

if TYPE_CHECKING:
    from pathlib import Path

    from coldstill.pipeline.results.figures import ModelFigures

TITLES = [
    "Learning curves", "Loss against size", "Loss against stored bytes", "Calibration",
    "Each student's own objective",
]  # fmt: skip
SMALL = Made(name="small", steps=40)
STUDENTS = [SMALL, Made(name="bare", loss=5.5, cached=0.0), Made(name="deep", parameters=9_000_000)]


def plots_of(folder: Path) -> dict[str, Any]:
    runs = [Run(folder)]
    return {plot.title: plot for plot in make_plots(compared_rows(runs), read_curves(runs))}


def html_of(*folders: Path) -> str:
    runs = [Run(folder) for folder in folders]
    return page(compared_rows(runs), read_curves(runs), [str(run.root) for run in runs])


def best(rows: list[ModelFigures]) -> set[tuple[str, str]]:
    return best_of((*QUALITY, *COST), rows)


def test_every_plot_has_every_student_with_its_figures(tmp_path: Path) -> None:
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
    assert max(bar.height for bar in panel.chart.bars) == 0.25


def test_a_learning_curve_is_against_tokens_and_states_how_it_was_averaged(tmp_path: Path) -> None:
    long = Made(name="long", steps=3 * MOST_POINTS + 1, batch_tokens=5000)
    folder = write_run(tmp_path, "a", [SMALL, long])
    curves = read_curves([Run(folder)])
    small, other = curves["small"], curves["long"]
    assert small.lines == 1
    expected = [(4096.0 * step, label_loss_at(SMALL, step)) for step in range(1, 41)]
    assert np.allclose(small.label_loss, expected)
    assert (other.lines, len(other.label_loss)) == (4, 61)
    # 5,000 tokens are four whole sequences of 1,024
    first = sum(label_loss_at(long, step) for step in range(1, 5)) / 4
    assert other.label_loss[0] == pytest.approx((4096 * 2.5, first))
    assert small.objective[0][1] == pytest.approx(label_loss_at(SMALL, 1) - 2)
    assert "mean of up to 4 neighbouring lines" in plots_of(folder)[TITLES[0]].caption
    # a steep beginning is cut off with a note
    plot = plots_of(write_run(tmp_path, "c", [Made(name="s", steps=400)]))[TITLES[0]]
    assert "In the first 10% of the training" in plot.caption
    assert plot.panels[0].chart.y.high < 8.0
    alone = plots_of(write_run(tmp_path, "b", [Made(name="s", steps=3)]))[TITLES[0]]
    assert "nothing is smoothed" in alone.caption
    assert "In the first 10%" not in alone.caption
    assert alone.panels[0].chart.y.high is None
    places, values = [1, 2, 3, 4, 5], [1.0, 3.0, None, "x", 8]
    assert averaged(places, values, 2) == ((1.5, 2.0), (5.0, 8.0))
    assert averaged(places, [None] * 5, 2) == ()
    for objective, words in (
        ({"kl": 1.0, "cross_entropy": 0.0}, "kl"),
        ({"kl": 0.5, "jsd": 2, "beta": 0.3, "skew": None}, "0.5 kl, 2 jsd, beta 0.3"),
        ({"kl": {"weight": 0.9, "schedule": "wsd"}}, "0.9 kl (wsd)"),
        ({"kl": 1.0, "temperature": 2.0}, "kl, at temperature 2.0"),
        (None, ""),
    ):
        assert in_words(objective) == words


def test_figures_that_older_versions_did_not_measure_are_named(tmp_path: Path) -> None:
    old = [Made(name="old", old=True), Made(name="bare", old=True, cached=0.0)]
    folder = write_run(tmp_path, "a", [SMALL, *old])
    students = folder / "students"
    (students / "bare" / "metrics.jsonl").write_text(
        '{"step": 1, "loss": 5.0, "cross_entropy": 5.0}\n{"step": 2, "lo', encoding="utf-8"
    )
    plots = plots_of(folder)
    for title, lost in zip(TITLES, ("old", "", "bare, old", "bare, old", ""), strict=True):
        left_out = re.findall(r"Left out: (.*) \(", plots[title].caption)
        assert left_out == ([lost] if lost else [])
    curves = {one.name: one.points for one in plots[TITLES[0]].panels[0].chart.series}
    assert curves["bare"] == ((4096.0, 5.0),)  # cross-entropy is the same figure
    # damaged metrics and settings cost only their plots
    (students / "small" / "metrics.jsonl").write_bytes(b"\xff[]{}")
    (students / "small" / "student.json").write_bytes(b"[1")
    (folder / "recipe.resolved.json").write_text("{}", encoding="utf-8")
    for student in ("old", "bare"):
        (students / student / "metrics.jsonl").unlink()
    assert html_of(folder).count("No model has these figures.") == 2


def test_the_best_student_of_a_column_is_marked_if_figures_compare(tmp_path: Path) -> None:
    rows = compared_rows([Run(write_run(tmp_path, "a", STUDENTS))])
    marked = best(rows)
    assert {("small", "loss"), ("deep", "loss"), ("small", "parameters"), ("bare", "bytes"),
            ("bare", CACHED)} <= marked  # fmt: skip
    assert ("bare", "loss") not in marked
    assert not any(key == "ece" for _, key in marked)  # all are alike
    assert "teacher" not in {name for name, _ in marked}
    place = [row.name for row in rows].index("small")
    rows[place] = rows[place].model_copy(update={"machine": "another"})
    timed = {column.key for column in COST if column.depends_on == "machine"}
    assert timed & {key for _, key in marked}
    assert not timed & {key for _, key in best(rows)}
    rows[place] = rows[place].model_copy(update={"heldout": "another"})
    assert {key for _, key in best(rows)} == {"parameters", "bytes", CACHED, "flops_per_token"}
    assert best(rows[:2]) == set()


@pytest.mark.slow
def test_the_page_is_a_single_file_and_a_plot_can_be_a_file(tmp_path: Path) -> None:
    folder = write_run(tmp_path, "a", STUDENTS)
    text = html_of(folder, write_run(tmp_path, "b", [SMALL]))
    tags = Tags(text)
    tags.expect_self_contained()
    pictures = [a for tag, a in tags.tags if tag == "svg"]
    assert all(a.get("aria-label") or a.get("aria-hidden") for a in pictures)
    ids = [a["id"] for _, a in tags.tags if "id" in a]
    assert len(ids) == len(set(ids))
    assert text.count("<h2>") == 2 + len(TITLES)
    assert len(text.encode()) < 200_000
    main(str(tmp_path / "plot.svg"), str(folder))
    text = (tmp_path / "plot.svg").read_text(encoding="utf-8")
    assert text.startswith('<svg xmlns="http://www.w3.org/2000/svg" width="792"')
    assert all(f">{student.name}<" in text for student in STUDENTS)


def test_hostile_names_are_escaped(tmp_path: Path) -> None:
    evil = "<img src=x onerror=alert(1)>&amp;{{ 7*7 }}'\""
    folder = write_run(tmp_path, evil, [SMALL])
    settings = folder / "students" / "small" / "student.json"
    recorded = json.loads(settings.read_text(encoding="utf-8"))
    recorded["student"]["objective"] = {"</p><script>": 1.0}
    settings.write_text(json.dumps(recorded), encoding="utf-8")
    figures = folder / "students" / "small" / "evaluation.json"
    changed = {**json.loads(figures.read_text(encoding="utf-8")), "machine": "<b>", "name": "<i>"}
    figures.write_text(json.dumps(changed), encoding="utf-8")
    text = html_of(folder, write_run(tmp_path, "b", [SMALL]))
    tags = Tags(text)
    tags.expect_self_contained()
    assert not {"img", "script", "b", "i"} & {tag for tag, _ in tags.tags}
    assert text.count("{{ 7*7 }}") > 3
    assert "&lt;img src=x onerror=alert(1)&gt;&amp;amp;" in text
