"""The page of a report: what it shows, what it leaves out, and hostile texts."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from coldstill.data.token_bytes import TokenBytes
from coldstill.pipeline.pages.compare.panels import DISK, LATENCY, MEMORY
from coldstill.pipeline.pages.report.page import page
from coldstill.pipeline.pages.report.pictures import covered_mass, entropies, trade_offs
from coldstill.pipeline.results.lineage import TeacherFacts, origin_in_words
from coldstill.pipeline.results.token_texts import TokenTexts
from compared import FORMATS, Made, row
from html_tags import Tags
from reported import record, report_facts
from tokenizers import Tokenizer, decoders, models

if TYPE_CHECKING:
    from pathlib import Path

    from coldstill.pipeline.results.facts import ReportFacts

TITLES = [
    "Teacher, corpus and students", "Figures", "What it costs to run",
    "Held-out loss against parameters, time per token and peak memory",
    "KL against parameters, time per token and peak memory", "Learning curves",
    "The store in numbers", "Entropy of the teacher", "Probability inside the head",
    "Sample text of the models", "How to reproduce the run",
]  # fmt: skip


def with_prompt(facts: ReportFacts, **changes: Any) -> ReportFacts:
    """The facts with another first prompt."""
    assert facts.continuations is not None
    first, *others = facts.continuations.prompts
    prompts = [replace(first, **changes), *others]
    return replace(facts, continuations=replace(facts.continuations, prompts=prompts))


def test_every_part_is_there_in_its_order_and_nothing_is_loaded(tmp_path: Path) -> None:
    text = page(report_facts(tmp_path))
    assert re.findall(r"<h2>(.*?)</h2>", text) == TITLES
    tags = Tags(text)
    tags.expect_self_contained()
    for part in (
        "small has 2.7% of the teacher's parameters, writes 6.1 times as fast and keeps",
        "f00df00df00d", "bfloat16", "731, 4.7% of them held out", "98.8% of all tokens",
        "16 most probable tokens", "1, 2", "compact, levels 127",
        "new llama, 2 layers of width 128", "bare no teacher", "40 steps",
        "40,785 in 160 sequences", "42.6 bytes",
        "334.1 MB at 16 bits each, 192 times as much", "KL 0.00016 nats", "11,803 tokens/s",
        "document 3, sequence 12 of the held-out store",
        "coldstill report", 'name = "big"  # <b>', "torch 2.13.0",
    ):  # fmt: skip
        assert part in tags.text, part


def test_texts_of_models_and_recipes_are_escaped(tmp_path: Path) -> None:
    evil = "</pre><script>alert(1)</script>&amp;{{ 7*7 }}`x`\x1b[31m\u202e"
    facts = report_facts(tmp_path)
    clean = {tag for tag, _ in Tags(page(facts)).tags}
    assert facts.continuations is not None
    models = facts.continuations.prompts[0].models
    facts = with_prompt(facts, text=evil, next=evil, models={**models, "small": evil})
    assert facts.continuations is not None
    again = replace(facts.reproduce, recipe=evil, commands=[evil], environment={evil: evil})
    facts = replace(
        facts, result=evil, name=evil, reproduce=again,
        continuations=replace(facts.continuations, missing={"teacher": evil}),
        corpus=replace(facts.corpus, files=(evil,)),
        teacher=replace(facts.teacher, name=evil),
        students=[replace(facts.students[0], origin=evil), *facts.students[1:]],
    )  # fmt: skip
    tags = Tags(page(facts))
    assert {tag for tag, _ in tags.tags} == clean
    assert tags.text.count("alert(1)") > 10
    assert "{{ 7*7 }}" in tags.text
    assert "\x1b" not in page(facts)
    assert "`x`\\x1b[31m\\u202e" in tags.text  # of a recipe too


def test_tokens_become_legible_text(tmp_path: Path) -> None:
    letters = {"\u0120a": 0, "\u00e2": 1, "\u0124": 2, "\u00ac": 3, "\u012f": 4, "<": 5}
    tokenizer = Tokenizer(models.BPE(vocab=letters, merges=[]))
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<end>"])
    tokenizer.add_tokens(["plain"])
    texts = TokenTexts(TokenBytes(tokenizer))
    assert texts.text([0, 1, 2, 3, 5]) == " a\u20ac<"  # one character of three tokens
    assert texts.text([1, 2, 5]) == "\\xe2\\x82<"
    assert texts.text([0, 99]) == " a#99"
    assert texts.text([0, 6]) == " a<end>"
    assert texts.text([]) == ""
    # prose has no special tokens, and an ellipsis where it was cut
    assert texts.prose([5, 5]) == "<<\u2026"
    assert texts.prose([5, 5], ended=True) == "<<"
    assert texts.prose([6, 5, 7, 6]) == "<plain"
    assert texts.prose([6]) == ""
    assert texts.prose([]) == "\u2026"
    assert TokenTexts(None).prose([0, 7]) == "#0#7\u2026"
    facts = report_facts(tmp_path)
    empty = page(with_prompt(facts, models={"small": "", "bare": "s\n\n\nt" + 37 * "\n"}))
    assert empty.count("<pre><i>nothing: the text ends here</i></pre>") == 1
    assert "<bdi>s\n\n\nt<i> 37 line ends </i></bdi>" in empty


def test_points_are_the_figures_and_missing_ones_are_named(tmp_path: Path) -> None:
    rows = report_facts(tmp_path).models
    loss, kl = trade_offs(rows)
    assert [panel.name for panel in loss.panels] == ["Parameters", "Time per token", "Peak memory"]
    latency = {one.name: one.points for one in loss.panels[1].chart.series}
    small = next(one for one in rows if one.name == "small")
    speed = small.generation[0]
    assert latency["small"] == ((1000 * speed.token_seconds, small.loss),)
    assert latency.keys() == {"teacher", "small", "bare"}
    memory = {one.name: one.points for one in kl.panels[2].chart.series}
    assert memory["small"] == ((speed.memory_bytes, small.kl),)
    assert "not measured" not in loss.caption
    # 0 is too little to be measured
    weightless = speed.model_copy(update={"memory_bytes": 0})
    other = {"generation": (weightless,), "machine": "another"}
    rows = [
        rows[0].model_copy(update={"generation": (rows[0].generation[1],)}),
        *(one.model_copy(update=other if one is small else {}) for one in rows[1:]),
    ]
    caption = trade_offs(rows)[0].caption
    assert "Left out: teacher (time per token not measured)." in caption
    assert "small (peak memory not measured)." in caption
    assert "Time per token is of different machines, so it does not compare." in caption
    untimed = [one.model_copy(update={"generation": ()}) for one in rows]
    loss, kl = trade_offs(untimed)
    assert loss.title == "Held-out loss against parameters"
    assert [len(plot.panels) for plot in (loss, kl)] == [1, 1]
    assert "Time per token was not measured; coldstill evaluate does it." in loss.caption
    assert "Peak memory was not measured; coldstill evaluate does it." in loss.caption
    other = row("other", bytes=926_336)
    assert [cost.value(other) for cost in (DISK, MEMORY)] == [926_336, 5 * 926_336 + 40_000]
    assert LATENCY.value(row("older", generation=[])) is None


def test_exports_are_outlines_joined_to_their_student_and_can_be_made_again(tmp_path: Path) -> None:
    bare = Made(name="bare", loss=5.5, cached=0.0, exports=("hf",))
    students = [Made(name="small", exports=FORMATS), bare]
    facts = report_facts(tmp_path, students)
    loss, kl = trade_offs(facts.models)
    parameters, *others = loss.panels
    names = {"teacher", "small", "bare"}
    assert {one.name for one in parameters.chart.series} == names
    assert [panel.name for panel in others] == ["Size on disk", "Time per token", "Peak memory"]
    exports = {*(f"small ({name})" for name in FORMATS), "bare (hf)"}
    for panel in (*others, *kl.panels[1:]):
        series = {one.name: one for one in panel.chart.series}
        assert series.keys() == names | exports
        for name in exports:
            student = series[name.partition(" ")[0]]
            assert (series[name].joined_to, series[name].look) == (student.name, student.look)
            assert series[name].label == name.rpartition("(")[2].rstrip(")")
        assert len({series[name].hollow for name in exports}) == len(FORMATS)
        assert series["small (hf)"].hollow == series["bare (hf)"].hollow
    assert (loss.columns, kl.columns) == (2, 2)
    assert "An outline is an export" in loss.caption
    assert "An outline" not in trade_offs(facts.models[:2])[0].caption
    assert "Left out" not in loss.caption
    text = page(facts)
    legends = re.findall(r'<ul class="key">(.*?)</ul>', text, re.DOTALL)
    shown = re.findall("<bdi>(.*?)</bdi>", legends[0])
    assert sorted(shown) == sorted(names | {*FORMATS})
    assert "2 students" in text  # exports are not students
    assert "Exported as torchao-int8, `small` takes 25% of its bytes, writes 2.0" in facts.result
    root = tmp_path / "big"
    assert facts.reproduce.commands[-3:] == [
        f"coldstill export {root} small --to {' --to '.join(FORMATS)}",
        f"coldstill export {root} bare --to hf", f"coldstill report {root}",
    ]  # fmt: skip


def test_histograms_show_shares_and_end_at_the_last_filled_bin() -> None:
    facts = record()
    counts = [30, 0, 10, *[0] * 21]
    for last, note in ((0, False), (1, True)):
        counts[-1] = last
        histogram = replace(facts.entropy_histogram, positions=tuple(counts))
        plot = entropies(replace(facts, entropy_histogram=histogram))
        bars = plot.panels[0].chart.bars
        assert [(bar.start, bar.end) for bar in bars[:3]] == [(0.0, 0.5), (0.5, 1.0), (1.0, 1.5)]
        assert [bar.height for bar in bars[:3]] == [30 / (40 + last), 0.0, 10 / (40 + last)]
        assert len(bars) == (24 if note else 3)
        assert ("The last bar holds all above." in plot.caption) == note
    mass = covered_mass(facts).panels[0].chart
    assert mass.y.high == max(bar.height for bar in mass.bars)


def test_missing_parts_are_replaced_by_the_reason(tmp_path: Path) -> None:
    facts = report_facts(tmp_path)
    headless = page(replace(facts, record=record(head=0)))
    assert "Probability inside the head" not in headless
    assert "head holds" not in headless
    facts = replace(
        facts, record=None, no_record="gone: no store there", continuations=None,
        no_continuations="gone too", teacher=TeacherFacts(origin="made here, 3 steps"),
        reproduce=replace(facts.reproduce, recipe=None),
    )  # fmt: skip
    text = Tags(page(facts)).text
    assert "Not known: gone: no store there." in text
    assert "Not shown: gone too." in text
    assert "recipe.toml" not in text
    assert "Sample text of the models" not in page(replace(facts, no_continuations=""))
    facts = report_facts(tmp_path / "fewer")
    assert facts.continuations is not None
    for count, note in (
        (1, "Beginnings of 1 held-out document (of 3 asked for)"),
        (0, "No held-out document is long enough"),
    ):
        prompts = facts.continuations.prompts[:count]
        assert note in page(
            replace(facts, continuations=replace(facts.continuations, prompts=prompts))
        )


def test_many_students_are_listed_shortly_with_those_of_the_result(tmp_path: Path) -> None:
    many = [Made(name=f"s{i}", loss=5 + i / 100) for i in range(12)]
    alone = [Made(name=name, loss=loss, cached=0.0) for name, loss in (("b", 5.5), ("c", 5.6))]
    text = Tags(page(report_facts(tmp_path, [*many, *alone]))).text
    assert "14 students" in text
    assert "and 8 more" in text
    assert "b no teacher, the baseline" in text


def test_an_origin_is_described_in_words() -> None:
    several = [{"parameters": "50%"}, {"parameters": 90_000}]
    origins: list[tuple[dict[str, Any], str]] = [
        ({"model": "org/name"}, "starts from org/name"),
        ({"layers": {"every": 2, "keep": None}}, "of the teacher's layers: one in 2"),
        ({"layers": {"keep": 4}, "lora": {"rank": 8}},
         "of the teacher's layers: 4, evenly spaced; adapters of rank 8, merged"),
        ({"layers": {"only": [0, 2]}}, "of the teacher's layers: 0, 2"),
        ({"prune": {"hidden": 96, "layers": None}}, "pruned out of the teacher: width 96"),
        ({"prune": {"layers": 1, "heads": 4, "feed_forward": 1536, "parameters": None}},
         "pruned out of the teacher: 1 layer, 1,536 neurons, 4 heads"),
        ({"prune": several, "lora": {"rank": 8}},
         "pruned out of the teacher: 50% of its parameters, then 90,000 parameters; adapters of "
         "rank 8, merged"),
        ({"model": "a", "quantize": {"scheme": "int4", "start": 0.5}},
         "starts from a; trained with int4 weights after 50% of the steps"),
        ({"quantize": {"scheme": "int8", "start": 0.0}}, "trained with int8 weights"),
        ({}, "of unknown origin"),
    ]  # fmt: skip
    for origin, words in origins:
        assert origin_in_words(origin) == words
