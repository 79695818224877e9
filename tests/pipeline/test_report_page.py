"""The page of a report: what it shows, what it leaves out, and what texts cannot do to it."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from typing import TYPE_CHECKING, Any

import pytest
from coldstill.data.token_bytes import TokenBytes
from coldstill.pipeline.pages.compare.trade_off import DISK, LATENCY, MEMORY
from coldstill.pipeline.pages.inspect.tokens import TokenTexts
from coldstill.pipeline.pages.report.page import page
from coldstill.pipeline.pages.report.pictures import covered_mass, entropies, trade_offs
from coldstill.pipeline.results.lineage import origin_in_words
from compared import FORMATS, Made
from reported import STUDENTS, record, report_facts
from tokenizers import Tokenizer, decoders, models

if TYPE_CHECKING:
    from pathlib import Path

TITLES = [
    "What was distilled from what", "Figures", "What it costs to run",
    "Held-out loss against parameters, time per token and peak memory",
    "KL against parameters, time per token and peak memory", "Learning curves",
    "The teacher's cache in numbers", "How sure the teacher was", "What the head covers",
    "What they write", "How to make it again",
]  # fmt: skip


class Tags(HTMLParser):
    """Every tag with its attributes, and whether all are closed; the text besides."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def parsed(facts: dict[str, Any]) -> Tags:
    text = page(facts)
    tags = Tags(text[text.index("<html") :])
    assert tags.open == []
    return tags


def test_everything_is_there_in_its_order(tmp_path: Path) -> None:
    facts = report_facts(tmp_path)
    text = page(facts)
    assert re.findall(r"<h2>(.*?)</h2>", text) == [title.replace("'", "&#x27;") for title in TITLES]
    told = parsed(facts).text
    assert "small has 2.7% of the teacher's parameters, writes 6.1 times as fast and keeps" in told
    for part in (
        "f00df00df00d", "bfloat16", "731, 4.7% of them held out", "98.8% of all tokens",
        "16 most probable tokens", "1, 2", "compact, levels 127",
        "new llama, 2 layers of width 128", "bare no teacher", "40 steps",
        "40,785 in 160 sequences", "42.6 bytes",
        "334.1 MB at 16 bits each, 192 times as much", "KL 0.00016 nats", "11,803 tokens/s",
        "document 3, sequence 12 of the held-out store",
        "coldstill report", 'name = "big"  # <b>', "torch 2.13.0",
    ):  # fmt: skip
        assert part in told, part


def test_the_page_needs_nothing_and_runs_nothing(tmp_path: Path) -> None:
    tags = parsed(report_facts(tmp_path))
    names = {tag for tag, _ in tags.tags}
    assert not names & {"script", "img", "link", "iframe", "object", "form"}
    for _, attributes in tags.tags:
        assert not {"style", "src", "href"} & attributes.keys()
        assert not any(name.startswith("on") for name in attributes)
    policy = next(a["content"] for _, a in tags.tags if "http-equiv" in a)
    assert policy is not None
    assert policy.startswith("default-src 'none'; base-uri 'none'; form-action 'none'; style-src")
    assert "unsafe" not in policy


def test_texts_of_models_and_recipes_stay_texts(tmp_path: Path) -> None:
    evil = "</pre><script>alert(1)</script>&amp;@@TABLE@@`x`\x1b[31m\u202e"
    facts = report_facts(tmp_path)
    clean = {tag for tag, _ in parsed(facts).tags}
    prompt = facts["continuations"]["prompts"][0]
    prompt |= {"text": evil, "next": evil}
    prompt["models"]["small"] = evil
    facts["continuations"]["missing"] = {"teacher": evil}
    facts["reproduce"] |= {"recipe": evil, "commands": [evil], "environment": {evil: evil}}
    facts["corpus"]["files"] = [evil]
    facts["teacher"]["name"] = facts["students"][0]["origin"] = evil
    facts["result"] = facts["name"] = evil
    tags = parsed(facts)
    assert {tag for tag, _ in tags.tags} == clean
    assert tags.text.count("alert(1)") > 10
    assert "\x1b" not in page(facts)
    assert "`x`\\x1b[31m\\u202e" in tags.text  # of a recipe too


def test_a_row_of_tokens_is_legible_text() -> None:
    letters = {"\u0120a": 0, "\u00e2": 1, "\u0124": 2, "\u00ac": 3, "\u012f": 4, "<": 5}
    tokenizer = Tokenizer(models.BPE(vocab=letters, merges=[]))
    tokenizer.decoder = decoders.ByteLevel()
    texts = TokenTexts(TokenBytes(tokenizer))
    assert texts.text([0, 1, 2, 3, 5]) == " a\u20ac<"  # one character of three tokens
    assert texts.text([1, 2, 5]) == "\\xe2\\x82<"
    assert texts.text([0, 99]) == " a#99"
    assert texts.text([]) == ""


def test_text_to_be_read_has_no_special_tokens_and_says_where_it_was_cut() -> None:
    tokenizer = Tokenizer(models.BPE(vocab={"a": 0, "b": 1}, merges=[]))
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<end>"])
    tokenizer.add_tokens(["plain"])
    texts = TokenTexts(TokenBytes(tokenizer))
    assert texts.prose([0, 1]) == "ab\u2026"
    assert texts.prose([0, 1], ended=True) == "ab"
    assert texts.prose([2, 0, 3, 2]) == "aplain"
    assert texts.prose([2]) == ""
    assert texts.prose([]) == "\u2026"
    assert texts.text([0, 2]) == "a<end>"
    assert TokenTexts(None).prose([0, 7]) == "#0#7\u2026"


def test_a_model_that_says_nothing_is_told_to(tmp_path: Path) -> None:
    facts = report_facts(tmp_path)
    facts["continuations"]["prompts"][0]["models"]["small"] = ""
    assert page(facts).count("<pre><i>nothing: it ends here</i></pre>") == 1


def test_points_are_the_figures_and_what_was_not_measured_is_told(tmp_path: Path) -> None:
    rows = report_facts(tmp_path)["models"]
    loss, kl = trade_offs(rows)
    assert [panel.name for panel in loss.panels] == ["Parameters", "Time per token", "Peak memory"]
    latency = {one.name: one.points for one in loss.panels[1].chart.series}
    small = next(row for row in rows if row["name"] == "small")
    speed = small["generation"][0]
    assert latency["small"] == ((1000 * speed["token_seconds"], small["loss"]),)
    assert latency.keys() == {"teacher", "small", "bare"}
    memory = {one.name: one.points for one in kl.panels[2].chart.series}
    assert memory["small"] == ((speed["memory_bytes"], small["kl"]),)
    assert "not measured" not in loss.caption
    rows[0]["generation"][0]["token_seconds"] = None
    speed["memory_bytes"] = 0  # too little to be measured
    small["machine"] = "another"
    loss, _ = trade_offs(rows)
    assert "Left out: teacher (time per token not measured)." in loss.caption
    assert "Left out: small (peak memory not measured)." in loss.caption
    assert "Time per token is of different machines, so it does not compare." in loss.caption
    for row in rows:
        row |= {"generation": []}
    loss, kl = trade_offs(rows)
    assert loss.title == "Held-out loss against parameters"
    assert [len(plot.panels) for plot in (loss, kl)] == [1, 1]
    assert "Time per token was not measured; coldstill evaluate does it." in loss.caption
    assert "Peak memory was not measured; coldstill evaluate does it." in loss.caption


def test_size_on_disk_has_a_plot_where_it_is_another(tmp_path: Path) -> None:
    rows = report_facts(tmp_path)["models"]
    small = next(row for row in rows if row["name"] == "small")
    rows.append({**small, "name": "other", "bytes": small["parameters"]})
    loss, _ = trade_offs(rows)
    assert [panel.name for panel in loss.panels][1] == "Size on disk"
    assert [cost.value(rows[-1]) for cost in (DISK, MEMORY)] == [926_336, 5 * 926_336 + 40_000]
    assert LATENCY.value({}) is None  # as rows of an older version


def test_exports_are_outlines_joined_to_their_student_where_they_can_differ(tmp_path: Path) -> None:
    students = [Made(name="small", exports=FORMATS), Made(name="bare", exports=("hf",))]
    facts = report_facts(tmp_path, students)
    loss, kl = trade_offs(facts["models"])
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
    assert "An outline" not in trade_offs(facts["models"][:2])[0].caption
    assert "Left out" not in loss.caption
    text = page(facts)
    (key, _) = re.findall(r'<ul class="key">(.*?)</ul>', text)
    told = re.findall("<bdi>(.*?)</bdi>", key)
    assert {*told} == names | {*FORMATS}
    assert len(told) == len({*told})


def test_exports_are_told_and_made_again(tmp_path: Path) -> None:
    facts = report_facts(tmp_path, [Made(name="small", exports=("onnx-int8", "hf"))])
    assert (
        "Exported as onnx-int8, `small` takes 45% of its bytes, writes 1.5 times as fast"
        in (facts["result"])
    )
    commands = facts["reproduce"]["commands"]
    root = tmp_path / "big"
    assert commands[-2:] == [
        f"coldstill export {root} small --to hf --to onnx-int8", f"coldstill report {root}",
    ]  # fmt: skip
    assert "2 students" not in parsed(facts).text  # an export is none


def test_histograms_are_of_shares_and_end_where_they_are_empty() -> None:
    facts = record()
    facts["histograms"]["entropy"]["positions"] = [30, 0, 10, *[0] * 21]
    bars = entropies(facts).panels[0].chart.bars
    assert bars is not None
    assert bars.shares == (0.75, 0.0, 0.25)
    assert bars.edges == (0.0, 0.5, 1.0, 1.5)
    assert "The last bar" not in entropies(facts).caption
    facts["histograms"]["entropy"]["positions"][-1] = 1
    assert "The last bar holds all above." in entropies(facts).caption
    mass = covered_mass(facts).panels[0].chart
    assert mass.y.high == max(mass.bars.shares)  # type: ignore[union-attr]


def test_without_a_head_nothing_is_said_of_one(tmp_path: Path) -> None:
    facts = {**report_facts(tmp_path), "record": record(head=0)}
    text = page(facts)
    assert "What the head covers" not in text
    assert "head holds" not in text


def test_many_students_are_told_shortly_with_those_that_matter(tmp_path: Path) -> None:
    many = [Made(name=f"s{i}", loss=5 + i / 100) for i in range(12)]
    alone = [Made(name=name, loss=loss, cached=0.0) for name, loss in (("b", 5.5), ("c", 5.6))]
    told = parsed(report_facts(tmp_path, [*many, *alone])).text
    assert "14 students" in told
    assert "and 8 more" in told
    assert "b no teacher, the baseline" in told


def test_what_is_missing_is_told_in_a_sentence(tmp_path: Path) -> None:
    facts = report_facts(tmp_path)
    facts |= {"record": None, "no_record": "gone: no store there", "continuations": None}
    facts |= {"no_continuations": "gone too", "teacher": {"origin": "made here, 3 steps"}}
    facts["reproduce"] |= {"recipe": None}
    told = parsed(facts).text
    assert "Not told: gone: no store there." in told
    assert "Not shown: gone too." in told
    assert "recipe.toml" not in told
    facts["no_continuations"] = ""
    assert "What they write" not in parsed(facts).text


def test_many_line_ends_in_a_row_are_counted(tmp_path: Path) -> None:
    facts = report_facts(tmp_path)
    facts["continuations"]["prompts"][0]["models"]["small"] = "s\n\n\nt" + 37 * "\n"
    assert "<bdi>s\n\n\nt<i> 37 line ends </i></bdi>" in page(facts)


def test_fewer_prompts_than_asked_are_told(tmp_path: Path) -> None:
    facts = report_facts(tmp_path)
    facts["continuations"]["prompts"] = facts["continuations"]["prompts"][:1]
    assert "Beginnings of 1 held-out document (of 3 asked for)" in parsed(facts).text
    facts["continuations"]["prompts"] = []
    assert "No held-out document is long enough" in parsed(facts).text


@pytest.mark.parametrize(
    ("origin", "words"),
    [
        ({"model": "org/name"}, "starts from org/name"),
        ({"layers": {"every": 2, "keep": None}}, "of the teacher's layers: one in 2"),
        ({"layers": {"keep": 4}, "lora": {"rank": 8}},
         "of the teacher's layers: 4, evenly spaced; adapters of rank 8, merged"),
        ({"layers": {"only": [0, 2]}}, "of the teacher's layers: 0, 2"),
        ({"prune": {"hidden": 96, "layers": None}}, "pruned out of the teacher: width 96"),
        ({"prune": {"layers": 1, "heads": 4, "feed_forward": 1536, "parameters": None}},
         "pruned out of the teacher: 1 layer, 1,536 neurons, 4 heads"),
        ({"prune": [{"parameters": "50%"}, {"parameters": 90_000}], "lora": {"rank": 8}},
         "pruned out of the teacher: 50% of its parameters, then 90,000 parameters; adapters of "
         "rank 8, merged"),
        ({}, "of unknown origin"),
    ],
)  # fmt: skip
def test_an_origin_is_told_in_words(origin: dict[str, Any], words: str) -> None:
    assert origin_in_words(origin) == words
    assert STUDENTS[0].name == "small"
