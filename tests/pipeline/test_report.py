"""`coldstill report`: its facts, the continuations it keeps, and missing records."""

from __future__ import annotations

import json
import shlex
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from coldstill.data.store.reader import open_store
from coldstill.pipeline.recipe.reading import load_recipe
from coldstill.pipeline.recipe.run_folder import Run
from coldstill.pipeline.results.continuations import template_frame
from coldstill.pipeline.results.reproduce import reproduction
from coldstill.stages.models import loading
from printed import sentences

if TYPE_CHECKING:
    from desk import Desk

pytest_plugins = ("desk",)


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The folders that models are loaded from, in order."""
    names: list[str] = []
    own = loading.load_model

    def load_model(name: str, where: str, **options: Any) -> Any:
        names.append(str(Path(name).relative_to(Path.cwd()) if Path(name).is_absolute() else name))
        return own(name, where, **options)

    monkeypatch.setattr(loading, "load_model", load_model)
    return names


def facts_of(desk: Desk, *arguments: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(desk.done("report", "r", "--json", *arguments).stdout)
    return found


@pytest.mark.slow
def test_the_page_the_result_and_the_facts_come_from_the_records(finished: Desk) -> None:
    result = finished.done("report", "r.toml")
    note = ["report: page: runs/r/report/index.html; open it in a browser"]
    assert sentences(result.stderr) == note
    assert result.stdout.count("\n") == 1
    assert result.stdout.startswith("`small` has ")
    page = (finished.run / "report" / "index.html").read_text(encoding="utf-8")
    assert "<b>small</b> has " in page
    facts = facts_of(finished)
    assert facts["result"] + "\n" == result.stdout
    assert (facts["best"], facts["baseline"]) == ("small", "baseline")
    assert (finished.run / "report" / "index.html").read_text(encoding="utf-8") == page
    store, heldout = (open_store(finished.run / name) for name in ("logits", "heldout"))
    assert facts["teacher"]["fingerprint"] == store.manifest.teacher.fingerprint
    assert facts["teacher"]["origin"] == "teacher, as it is"
    record, corpus = facts["record"], finished.json("corpus", "corpus.json")
    assert record["positions"] == store.positions
    assert record["bytes"] == sum(commit.bytes for commit in store.commits())
    assert record["full_logits_bytes"] == store.positions * store.manifest.tokenizer.size * 2
    assert sum(record["histograms"]["entropy"]["positions"]) == store.positions
    assert record["measurements"]["capture_tokens_per_second"] > 0
    assert facts["heldout"] == {"positions": heldout.positions, "head": 16, "tail": 8}
    splits = corpus["splits"].values()
    assert facts["corpus"]["documents"] == sum(split["documents"] for split in splits)
    learned = sum(s["positions"] for s in splits) / sum(s["tokens"] for s in splits)
    assert facts["corpus"]["supervised_share"] == pytest.approx(learned)
    students = {one["name"]: one for one in facts["students"]}
    assert list(students) == [row["name"] for row in facts["models"][1:]]
    assert students["small"]["origin"] == "new llama, 1 layer of width 32"
    objectives = {name: (one["objective"], one["uses_teacher"]) for name, one in students.items()}
    assert objectives == {"small": ("kl", True), "baseline": ("cross_entropy", False)}
    assert facts["curves"].keys() == students.keys()
    written = facts["continuations"]
    texts = [path.read_text(encoding="utf-8") for path in Path(_texts(finished)).iterdir()]
    assert (written["seed"], len(written["prompts"]), written["missing"]) == (0, 3, {})
    for prompt in written["prompts"]:
        assert "<|endoftext|>" not in prompt["text"] + prompt["next"]
        whole = (prompt["text"] + prompt["next"]).removesuffix("\u2026")
        assert any(text.startswith(whole) for text in texts)
        assert prompt["next"].endswith("\u2026") or whole in texts
        assert list(prompt["models"]) == ["teacher", "small", "baseline"]
        assert all(prompt["models"].values())
    # figures of an older version lack what tells whether a student used a teacher
    for path in finished.run.glob("students/*/evaluation.json"):
        figures = json.loads(path.read_text(encoding="utf-8"))
        del figures["cached_bytes_per_position"]
        path.write_text(json.dumps(figures), encoding="utf-8")
    assert facts_of(finished, "--no-continuations")["students"] == facts["students"]


def _texts(desk: Desk) -> str:
    return str(desk.json("recipe.resolved.json")["recipe"]["corpus"]["files"][0])


@pytest.mark.slow
def test_students_that_are_missing_or_not_evaluated_are_named(finished: Desk) -> None:
    students = finished.run / "students"
    finished.done("report", "r", "--html", "pages/r.html", "--no-continuations")
    assert (finished.root / "pages" / "r.html").is_file()
    assert not (finished.run / "report").exists()
    kept = (students / "small" / "evaluation.json").read_bytes()
    (students / "small" / "evaluation.json").unlink()
    facts = facts_of(finished, "--no-continuations")
    assert "small" not in {row["name"] for row in facts["models"]}
    page = (finished.run / "report" / "index.html").read_text(encoding="utf-8")
    assert "not evaluated" in page
    (students / "small" / "evaluation.json").write_bytes(kept)
    shutil.rmtree(students / "baseline")
    facts = facts_of(finished, "--no-continuations")
    assert facts["baseline"] is None
    assert "The teacher's effect on it is not known" in facts["result"]
    (students / "small" / "evaluation.json").unlink()
    line = finished.refused("report", "r")
    assert line == "error: runs/r: no student is evaluated yet; run coldstill evaluate"
    line = finished.refused("report", "nowhere")
    assert line.startswith("error: nowhere: no recipe file, no run folder and no built-in recipe")


@pytest.mark.slow
def test_texts_are_generated_once_and_again_only_after_a_change(
    finished: Desk, loaded: list[str]
) -> None:
    first = facts_of(finished)["continuations"]
    students = {f"runs/r/students/{name}/model" for name in ("small", "baseline")}
    assert len(loaded) == 3
    assert students < {*loaded}
    path = finished.run / "report" / "continuations.json"
    kept = path.read_bytes()
    loaded.clear()
    assert facts_of(finished)["continuations"] == first
    assert loaded == []
    # damaged records are generated again
    shorter = json.loads(kept)
    shorter["models"]["small"]["written"].pop()
    for damage in ("{", json.dumps(shorter)):
        path.write_text(damage, encoding="utf-8")
        assert facts_of(finished)["continuations"] == first
    loaded.clear()
    weights = finished.run / "students" / "small" / "model" / "model.safetensors"
    shutil.copy(finished.run / "students" / "baseline" / "model" / "model.safetensors", weights)
    again = facts_of(finished)["continuations"]
    assert loaded == ["runs/r/students/small/model"]
    for prompt in again["prompts"]:
        written = prompt["models"]
        assert written["small"] == written["baseline"]
    assert path.read_bytes() != kept
    loaded.clear()
    assert len(facts_of(finished, "--prompts", "2")["continuations"]["prompts"]) == 2
    assert len(loaded) == 3


@pytest.mark.slow
def test_a_replaced_teacher_and_a_damaged_student_generate_no_text(finished: Desk) -> None:
    student = finished.run / "students" / "small" / "model"
    shutil.copy(student / "model.safetensors", finished.root / "teacher")
    shutil.copy(student / "config.json", finished.root / "teacher")
    path = student / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    missing = facts_of(finished)["continuations"]["missing"]
    assert missing.keys() == {"teacher", "small"}
    assert missing["teacher"] == "its folder holds another model than the one that was captured"
    assert "cannot load" in missing["small"]


@pytest.mark.slow
def test_a_run_without_stores_or_corpus_keeps_its_figures(finished: Desk) -> None:
    for path in (finished.run / "heldout" / "shards").glob("*.arrow"):
        path.write_bytes(path.read_bytes()[:-9])
    whole = facts_of(finished)
    assert whole["continuations"] is None
    assert "damaged" in whole["no_continuations"]
    for name in ("logits", "heldout", "corpus"):
        shutil.rmtree(finished.run / name)
    facts = facts_of(finished)
    assert facts["result"] == whole["result"]
    assert facts["record"] is facts["heldout"] is facts["continuations"] is None
    page = (finished.run / "report" / "index.html").read_text(encoding="utf-8")
    assert "Not known: " in page
    assert "Not shown: " in page
    assert page.count("no manifest.json there") == 3


@pytest.mark.slow
def test_a_missing_teacher_is_noted_on_the_page(finished: Desk, loaded: list[str]) -> None:
    line = finished.refused("report", "r", "--html", "runs")
    assert line.startswith("error: runs: a folder; name the file that the page is to be")
    shutil.rmtree(finished.root / "teacher")
    finished.done("report", "r")
    assert len(loaded) == 2
    page = (finished.run / "report" / "index.html").read_text(encoding="utf-8")
    assert "Teacher: not shown, its folder is not on this machine." in page
    assert "<bdi>Teacher</bdi>" not in page


@pytest.mark.slow
def test_the_commands_make_the_run_again_with_changed_settings(
    finished: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(finished.root)
    again = facts_of(finished, "--no-continuations")["reproduce"]
    assert again["recipe"] == (finished.root / "r.toml").read_text(encoding="utf-8")
    assert again["settings"] == again["students_beside"] == []
    assert again["commands"] == [
        "coldstill run r.toml   # the recipe below, under this name", "coldstill report runs/r",
    ]  # fmt: skip
    assert again["environment"] == finished.json("env.json")
    resolved = finished.json("recipe.resolved.json")
    resolved["recipe"]["seed"] = 7
    resolved["recipe"]["students"]["small"]["train"]["learning_rate"] = 0.5
    resolved["recipe"]["students"]["s-2"] = resolved["recipe"]["students"]["small"]
    finished.write("runs/r/recipe.resolved.json", json.dumps(resolved))
    # a student that is not trained is not made again
    root = Path("runs") / "r"
    assert reproduction(Run(root), []).students_beside == []
    (root / "students" / "s-2" / "model").mkdir(parents=True)
    changed = reproduction(Run(root), [])
    assert changed.settings == ["seed=7", "students.small.train.learning_rate=0.5"]
    assert changed.students_beside == ["s-2"]
    assert " --set seed=7 --set students.small" in changed.commands[0]
    # the settings of a student that the recipe does not name make the same student
    words = shlex.split(changed.commands[1])
    assert words[:6] == ["coldstill", "train-student", "runs/r", "--student", "s-2", "--set"]
    fresh = load_recipe("r.toml", tuple(words[6:]), "s-2")
    assert fresh.recipe.students["s-2"] == load_recipe("runs/r").recipe.students["s-2"]
    # a folder with another name or place is made again under that name and place
    renamed = Path("else") / "renamed"
    renamed.parent.mkdir()
    root.rename(renamed)
    moved = reproduction(Run(renamed), [])
    assert moved.commands[0].startswith("coldstill run renamed.toml --runs else --set ")
    assert 'name="renamed"' in (moved.settings or [])
    renamed.rename(root)
    finished.write("runs/r/recipe.toml", "not = toml = at all")
    unknown = reproduction(Run(finished.run), [])
    assert unknown.settings is None
    assert "with its own record for a recipe" in unknown.commands[0]


def test_a_chat_template_around_every_prompt_is_not_shown() -> None:
    """Tokens below 3 are special: 1 begins a text or a turn, 2 ends a turn."""

    def frame(*prompts: tuple[int, ...]) -> tuple[int, int]:
        return template_frame(prompts, lambda token: token < 3)

    start, end = (1, 7, 7, 2, 1, 8), (2, 1, 9)
    assert frame((*start, 20, 21, *end), (*start, 30, *end)) == (6, 3)
    # all questions end with the same token, which does not belong to the template
    assert frame((*start, 20, 21, 50, *end), (*start, 30, 50, *end)) == (6, 3)
    # plain texts begin alike, with a mark or without, and a single prompt has nothing in common
    assert frame((1, 40, 41, 42), (1, 40, 41, 43)) == (0, 0)
    assert frame((40, 41, 42), (40, 41, 43)) == (0, 0)
    assert frame((*start, 20, *end)) == (0, 0)
    # one prompt is nothing but the frame
    assert frame((*start, *end), (*start, 20, *end)) == (0, 0)
