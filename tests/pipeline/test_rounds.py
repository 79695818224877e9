"""Rounds: the recipe, the text that a student writes, and two machines that take turns."""

from __future__ import annotations

import itertools
import json
import shutil
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from coldstill.data.errors import ColdstillError
from coldstill.data.prepared import CorpusLayout, TokenizedDocument, build_sequences
from coldstill.data.store.reader import open_store
from coldstill.stages.models.loading import load_model, teacher_identity
from coldstill.stages.objective_config import ObjectiveConfig
from coldstill.stages.students.rounds.config import RoundsConfig
from coldstill.stages.students.rounds.writing import WritingJob, write_text
from conftest import VOCABULARY
from safetensors.torch import load_file
from small_runs import save_teacher
from small_students import KilledError
from student_recipe import ORIGIN, fault, load

if TYPE_CHECKING:
    from pathlib import Path

    from coldstill.data.schema import Sequences
    from coldstill.stages.report import Report
    from desk import Desk

pytest_plugins = ("desk",)

TABLE = "count = 2, prompts = 10, heldout = 5, prompt_tokens = 6, max_new_tokens = 8, steps = 2"
CONFIG = RoundsConfig(count=2, prompts=10, heldout=5, prompt_tokens=6, max_new_tokens=8)


def test_rounds_have_two_forms_that_survive_the_record_of_a_run(tmp_path: Path) -> None:
    for line, expected in (
        ("rounds = 3", RoundsConfig(count=3)),
        ("rounds = { count = 2, share = 0.25 }", RoundsConfig(count=2, share=0.25)),
        (
            "rounds = { count = 2, objective = { kl = 0.0, jsd = 1.0 } }",
            RoundsConfig(count=2, objective=ObjectiveConfig(kl=0.0, jsd=1.0)),
        ),
    ):
        student = load(tmp_path, f"{ORIGIN}\n{line}\n")["small"]
        assert student.rounds == expected
        assert type(student).model_validate(json.loads(student.model_dump_json())) == student
    text = f'{ORIGIN}\nrounds = 2\n[students.plain]\nlike = "small"\nrounds = 1\n'
    assert load(tmp_path, text)["plain"].rounds is None


def test_wrong_rounds_are_refused(tmp_path: Path) -> None:
    of_labels = "which would teach the student the tokens that it wrote itself"
    both = "objective = { cross_entropy = 0.5 }\n"
    for lines, message in (
        ("rounds = 0", ".rounds.count: input should be greater than or equal to 2, not 0"),
        ("rounds = true", ".rounds: "),
        ("rounds = { share = 0.5 }", ".rounds.count: missing, and it has no default"),
        ("rounds = { count = 2, promts = 3 }", "unknown key 'promts'; did you mean 'prompts'?"),
        ("rounds = { count = 2, prompts = 0 }", ".rounds.prompts: "),
        ("rounds = { count = 2, share = 1.5 }", ".rounds.share: "),
        (f"{both}rounds = 2", f"rounds: the objective has 'cross_entropy', {of_labels}"),
        (
            "rounds = { count = 2, objective = { residual_to_label = 1.0 } }",
            f"rounds: the objective has 'residual_to_label', {of_labels}",
        ),
        (
            'rounds = 2\nteachers = [{ logits = "x", weight = 0.5 }]',
            "rounds: a student of several teachers has none",
        ),
    ):
        line = fault(tmp_path, f"{ORIGIN}\n{lines}\n")
        assert line.startswith("r.toml: students.small")
        assert message in line
    load(tmp_path, f"{ORIGIN}\n{both}rounds = {{ count = 2, share = 0.0 }}\n")
    load(tmp_path, f"{ORIGIN}\n{both}rounds = {{ count = 2, objective = {{ kl = 1.0 }} }}\n")


def _job(desk: Desk, folder: Path, config: RoundsConfig = CONFIG) -> WritingJob:
    return WritingJob(
        name="small",
        model=desk.run / "students" / "small" / "model",
        round=1,
        config=config,
        sources={
            "train": open_store(desk.run / "logits"),
            "heldout": open_store(desk.run / "heldout"),
        },
        seed=3,
        folder=folder,
        speed=desk.root / "writing.json",
    )


def _documents(sequences: Sequences) -> list[tuple[list[int], list[int]]]:
    """The tokens of each document, and which of them are learned."""
    found = []
    for row in range(len(sequences)):
        tokens, positions = sequences.tokens[row].tolist(), set(sequences.positions[row].tolist())
        starts = [*sequences.document_starts[row].tolist(), len(tokens)]
        for begin, end in itertools.pairwise(starts):
            learned = [place - begin + 1 for place in range(begin, end) if place in positions]
            found.append((tokens[begin:end], learned))
    return found


def _split(folder: Path, split: Any) -> list[tuple[list[int], list[int]]]:
    file = CorpusLayout(folder).open(split)
    return _documents(file.read(np.arange(len(file))))


def test_a_student_continues_documents_and_only_its_answers_are_learned(finished: Desk) -> None:
    folder = finished.root / "text"
    write_text(_job(finished, folder))
    for split, count in (("train", 10), ("heldout", 5)):
        store = open_store(finished.run / ("logits" if split == "train" else "heldout"))
        documents = [
            tokens for tokens, _ in _documents(store.read(np.arange(len(store))).sequences)
        ]
        written = _split(folder, split)
        assert len(written) == count
        for tokens, learned in written:
            given = learned[0]
            assert learned == list(range(given, len(tokens)))
            assert 1 <= len(learned) <= 8
            assert any(
                tokens[:given] == whole[:given] and given == max(1, min(6, len(whole) // 2))
                for whole in documents
            )


def test_prompts_are_what_precedes_answers_or_the_beginnings_of_plain_documents() -> None:
    from coldstill.stages.students.rounds.writing import _prompts

    def document(index: int, length: int, first_learned: int) -> TokenizedDocument:
        tokens = 100 * index + np.arange(length, dtype=np.int32)
        return TokenizedDocument(index, tokens, np.arange(length) >= first_learned)

    packed = [
        [document(1, 20, 0), document(2, 9, 5)],  # plain; a prompt of 5 tokens
        [document(3, 4, 0), document(4, 6, 6), document(5, 1, 0)],  # short; nothing learned twice
        [document(6, 8, 7)],
    ]
    block = SimpleNamespace(sequences=build_sequences(0, packed))
    store: Any = SimpleNamespace(order=lambda seed, epoch: np.arange(3), read=lambda rows: block)
    found = _prompts(store, 99, 6, 0, "students.small.rounds")
    assert [(one.index, one.tokens_T.tolist()) for one in found] == [
        (1, [*range(100, 106)]),
        (2, [*range(200, 205)]),
        (3, [300, 301]),
        (6, [*range(600, 607)]),
    ]
    assert not any(one.learned_T.any() for one in found)
    assert len(_prompts(store, 2, 6, 0, "")) == 2


def test_fewer_prompts_than_asked_are_said(finished: Desk) -> None:
    notes: list[str | None] = []
    config = RoundsConfig(count=2, prompts=1, heldout=500, max_new_tokens=1)
    write_text(_job(finished, finished.root / "text", config), lambda r: notes.append(r.note))
    count = len(_split(finished.root / "text", "heldout"))
    said = f"has {count} documents with a prompt, fewer than the 500 that rounds asks for"
    assert [note for note in notes if note and "fewer than" in note] == [
        f"{open_store(finished.run / 'heldout').place} {said}"
    ]


def test_an_interrupted_writing_makes_the_same_text(
    finished: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    from coldstill.stages.students.rounds import writing

    monkeypatch.setattr(writing, "BATCH_TOKENS", 1)  # batches of 8 prompts
    whole, parts = finished.root / "whole", finished.root / "parts" / "text"
    write_text(_job(finished, whole))
    asked = iter([*[False] * 12, *[True] * 1000])
    write_text(_job(finished, parts), stop=lambda: next(asked))
    assert not parts.exists()
    kept = list(parts.parent.glob(".text-*/*.json"))
    assert [path.name for path in kept] == ["train-00000000.json"]
    before = kept[0].stat().st_mtime_ns
    notes = []
    write_text(_job(finished, parts), lambda report: notes.append((report.note, _age(kept[0]))))
    assert ("continuing: 8 of 15 answers done", before) in notes
    assert [path.name for path in parts.parent.iterdir()] == ["text"]
    for name in ("train.arrow", "heldout.arrow", "corpus.json"):
        assert (parts / name).read_bytes() == (whole / name).read_bytes()
    record = json.loads((whole / "corpus.json").read_text())["settings"]
    model = teacher_identity(
        str(finished.run / "students" / "small" / "model"), "", dtype="auto", revision="main"
    )
    assert record["written"]["fingerprint"] == model.fingerprint
    with pytest.raises(ColdstillError, match=r"was written with .*max_new_tokens = 8, now 7"):
        write_text(
            _job(finished, whole, RoundsConfig(count=2, prompts=10, heldout=5, prompt_tokens=6,
                                               max_new_tokens=7))
        )  # fmt: skip


def _age(path: Path) -> int | None:
    return path.stat().st_mtime_ns if path.exists() else None


def test_rounds_without_prompts_are_refused(
    finished: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    unlearned = TokenizedDocument(0, np.arange(9, dtype=np.int32), np.zeros(9, np.bool_))
    job = _job(finished, finished.root / "text")
    store = job.sources["heldout"]
    block = SimpleNamespace(sequences=build_sequences(0, [[unlearned]] * len(store)))
    monkeypatch.setattr(store, "read", lambda rows: block)
    with pytest.raises(ColdstillError) as error:
        write_text(job)
    message = f"students.small.rounds: no document of {store.place} gives a prompt, because none"
    assert str(error.value).startswith(message)
    assert not job.folder.exists()


def test_commands_refuse_students_without_rounds(finished: Desk) -> None:
    for command in ("next", "write", "capture"):
        line = finished.refused("rounds", command, "r.toml")
        assert line == "error: r: no student of the recipe has 'rounds', such as rounds = 2"
        line = finished.refused("rounds", command, "r.toml", "--student", "small")
        assert line.startswith("error: students.small: has no 'rounds', such as rounds = 2 (")
    line = finished.refused(
        "sweep", "r.toml", "--grid", "students.small.rounds=2,3",
    )  # fmt: skip
    assert "students.small has 'rounds', between which the teacher acts" in line


@pytest.fixture(scope="module")
def done(
    tmp_path_factory: pytest.TempPathFactory, texts: Path, tokenizer: Any
) -> tuple[Desk, list[Any]]:
    """Two students that went through two rounds on two machines, and every next action."""
    from desk import RECIPE, Desk

    desk, acts = Desk(tmp_path_factory.mktemp("rounds")), []
    save_teacher(desk.root / "teacher", tokenizer)
    text = RECIPE.format(texts=texts, teacher='model = "./teacher"')
    text = text.partition("[students.baseline]")[0].replace("head = 16", f"head = {VOCABULARY}")
    text += f'rounds = {{ {TABLE} }}\n[students.old]\nlike = "small"\nrounds = {{ share = 0.0 }}\n'
    desk.write("r.toml", text)
    desk.done("teacher-logits", "r.toml")
    there = Desk(desk.root / "there")  # the teacher's machine
    there.write("r.toml", text)
    (desk.root / "teacher").rename(there.root / "teacher")
    for _ in range(2):
        for command in ("train-student", "rounds write"):
            acts.append(json.loads(desk.done("rounds", "next", "r.toml", "--json").stdout))
            desk.done(*command.split(), "r.toml")
        acts.append(json.loads(desk.done("rounds", "next", "r.toml", "--json").stdout))
        shutil.rmtree(there.run, ignore_errors=True)  # each time another machine
        _carry(acts[-1], desk, there)
        assert " --runs " not in acts[-1][0]["command"]
        there.done("rounds", "capture", "r.toml")
        _carry(json.loads(there.done("rounds", "next", "r.toml", "--json").stdout), there, desk)
    desk.done("evaluate", "r.toml")
    acts.append(json.loads(desk.done("rounds", "next", "r.toml", "--json").stdout))
    return desk, acts


def _carry(acts: list[dict[str, Any]], source: Desk, target: Desk) -> None:
    """Copy what the next action reads, and nothing else, to the other machine."""
    for act in acts:
        for path in act["needs"]:
            shutil.copytree(source.root / path, target.root / path, dirs_exist_ok=True)


@pytest.mark.slow
def test_two_machines_take_turns(done: tuple[Desk, list[Any]]) -> None:
    desk, acts = done
    expected = [
        ("train", 1, "student"), ("write", 1, "student"), ("capture", 1, "teacher"),
        ("train", 2, "student"), ("write", 2, "student"), ("capture", 2, "teacher"),
        ("evaluate", 2, "student"),
    ]  # fmt: skip
    for student in (0, 1):
        found = [each[student] for each in acts]
        assert [(one["act"], one["round"], one["machine"]) for one in found] == expected
    assert not (desk.root / "teacher").exists()
    students = desk.run / "students"
    manifest = desk.json("students", "small", "written", "1", "logits", "manifest.json")
    first = teacher_identity(
        str(students / "small" / "written" / "1" / "model"), "", dtype="auto", revision="main"
    )
    assert manifest["written"]["round"] == 1
    assert manifest["written"]["fingerprint"] == first.fingerprint
    # `share = 0` writes only what is measured, and differs only after the first training
    assert not (students / "old" / "written" / "1" / "logits").exists()
    weights = [
        [load_file(students / name / part / "model" / "model.safetensors") for part in
         ("written/1", ".")]
        for name in ("small", "old")
    ]  # fmt: skip
    for key, weight in weights[0][0].items():
        assert torch.equal(weight, weights[1][0][key])
    assert any(not torch.equal(weight, weights[1][1][key]) for key, weight in weights[0][1].items())
    line = desk.done("compare", "r.toml").stdout
    assert "own text" in line


@pytest.mark.slow
def test_figures_on_own_text_are_those_of_the_dense_distributions(
    done: tuple[Desk, list[Any]],
) -> None:
    desk, _ = done
    teacher = load_model(str(desk.root / "there" / "teacher"), "", precision="fp32").double()
    figures = desk.json("students", "small", "evaluation.json")["own_text"]
    assert [one["round"] for one in figures] == [1, 2]
    for one in figures:
        round_folder = desk.run / "students" / "small" / "written" / str(one["round"])
        own = round_folder if one["round"] == 1 else desk.run / "students" / "small"
        student = load_model(str(own / "model"), "", precision="fp32").double()
        kl, acceptance = [], []
        for tokens, learned in _split(round_folder / "text", "heldout"):
            ids, places = torch.tensor([tokens]), torch.tensor(learned) - 1
            with torch.no_grad():
                p, q = (
                    model(input_ids=ids).logits[0, places, :VOCABULARY].softmax(-1)
                    for model in (teacher, student)
                )
            kl += (p * (p / q).log()).sum(1).tolist()
            acceptance += torch.minimum(p, q).sum(1).tolist()
        assert one["positions"] == len(kl)
        assert one["kl"] == pytest.approx(np.mean(kl), rel=1e-4)
        assert one["acceptance"] == pytest.approx(np.mean(acceptance), rel=1e-4)


@pytest.mark.slow
def test_a_killed_later_training_continues_bit_for_bit(
    done: tuple[Desk, list[Any]], make_desk: type[Desk], tmp_path: Path
) -> None:
    from coldstill.pipeline.recipe.work import open_work
    from coldstill.pipeline.steps.students import train_students

    shutil.copytree(done[0].root, tmp_path, dirs_exist_ok=True)
    desk = make_desk(tmp_path)
    small = desk.run / "students" / "small"
    for name in ("model", "checkpoints", "written/2"):
        shutil.rmtree(small / name)
    (small / "metrics.jsonl").unlink()

    def killed(report: Report) -> None:
        if report.stage == "train-student small round 2" and report.done >= 512:  # in step 2
            raise KilledError

    with pytest.raises(KilledError):
        train_students(open_work(desk.root / "r.toml", (), desk.root / "runs", killed), ["small"])
    assert not (small / "model").exists()
    said = desk.done("train-student", "r.toml", "--student", "small").stderr
    assert "resuming from step 1" in said
    assert "next: coldstill evaluate r.toml --student small" in said
    whole = done[0].run / "students" / "small"
    weights, expected = (load_file(one / "model" / "model.safetensors") for one in (small, whole))
    for key, weight in expected.items():
        assert torch.equal(weight, weights[key])


@pytest.mark.slow
def test_only_the_first_round_of_a_student_of_layers_needs_the_teacher(
    done: tuple[Desk, list[Any]], make_desk: type[Desk], tmp_path: Path
) -> None:
    shutil.copytree(done[0].root, tmp_path, dirs_exist_ok=True)
    desk, hidden = make_desk(tmp_path), tmp_path / "there" / "teacher"
    teacher = tmp_path / "teacher"
    text = (tmp_path / "r.toml").read_text(encoding="utf-8")
    desk.write(
        "r.toml", f'{text}[students.cut]\nlike = "small"\nlayers = [0]\nlora = {{ rank = 2 }}\n'
    )
    arguments = ("r.toml", "--student", "cut")
    line = desk.refused("train-student", *arguments)
    assert line == "error: students.cut.layers: no folder ./teacher"
    hidden.rename(teacher)
    desk.done("train-student", *arguments)
    teacher.rename(hidden)
    desk.done("rounds", "write", *arguments)
    hidden.rename(teacher)
    desk.done("rounds", "capture", *arguments)
    teacher.rename(hidden)
    desk.done("train-student", *arguments)
    config = desk.json("students", "cut", "model", "config.json")
    assert config["num_hidden_layers"] == 1
    assert not (desk.run / "students" / "cut" / "written" / "1" / "start").exists()


@pytest.mark.slow
def test_wrong_teachers_texts_and_settings_are_refused(
    done: tuple[Desk, list[Any]], make_desk: type[Desk], tmp_path: Path, tokenizer: Any
) -> None:
    shutil.copytree(done[0].root, tmp_path, dirs_exist_ok=True)
    desk = make_desk(tmp_path)
    line = desk.refused("train-student", "r.toml", "--set", "students.small.rounds.share=0.25")
    assert "students.small was trained with student.rounds.share = 0.5, now 0.25" in line
    written = desk.run / "students" / "small" / "written"
    shutil.rmtree(written / "2" / "heldout")
    save_teacher(desk.root / "teacher", tokenizer, seed=9)
    line = desk.refused("rounds", "capture", "r.toml")
    assert "students.small.rounds: teacher is not the teacher of the first store" in line
    # another model in the place of the one that wrote
    shutil.rmtree(desk.run / "students" / "small" / "model")
    shutil.rmtree(written / "2")
    shutil.rmtree(written / "1" / "model")
    shutil.copytree(desk.run / "students" / "old" / "model", written / "1" / "model")
    line = desk.refused("train-student", "r.toml", "--student", "small")
    assert "students.small.rounds: the text of " in line
    assert " was written by the model " in line
    (desk.run / "students" / "small" / "student.json").unlink()
    line = desk.refused("train-student", "r.toml", "--student", "small")
    assert "students.small has no student.json beside it, so its settings are unknown" in line
