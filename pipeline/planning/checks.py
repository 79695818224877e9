"""Checks before the first step that the models of a recipe will load and can be trained.

They read the JSON files and the headers of models only. transformers, which takes seconds to
import, is asked only if these look unusual.
"""

from __future__ import annotations

import json
import re
import zipfile
from collections import Counter
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

from ...data.corpus.document import BadRowError
from ...data.corpus.formats import read_documents
from ...data.corpus.sources import list_sources
from ...data.errors import ColdstillError
from ...data.files import read_json
from ...data.prepared import CorpusLayout
from ...stages.models.model_files import (
    INDEX_END,
    ORDER,
    UNPACKED,
    shards,
    size_in,
    weight_files_in,
)
from ...stages.planning.model_sizes import tensor_shapes
from ..recipe.own_tokens import own_tokens
from .models import (
    NamedModel,
    folder_of,
    named_teacher,
    student_family,
    student_models,
    student_sizes,
    teacher_family,
    teacher_sizes,
    tokenizer_of_model,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

    from ..recipe.tables import Recipe
    from ..recipe.work import Work


def expect_trainable(recipe: Recipe, students: Iterable[str], *, teacher: bool) -> None:
    """Refuse Trainer settings that would end a training at its start.

    students  names of the students that will be trained
    teacher   whether a teacher with `train` will be trained too

    Raises
        ColdstillError: the first wrong setting
    """
    tables = {f"students.{name}": recipe.student(name).train for name in students}
    if teacher and recipe.teacher.train is not None:
        tables = {"teacher": recipe.teacher.train, **tables}
    if not any(table.trainer for table in tables.values()):
        return  # nothing to check, so torch is not loaded
    from ...stages.training.rehearsal import expect_trainable as expect

    for where, table in tables.items():
        expect(table, where)


_WRAPPED = re.compile(r"(^|\.)(_\w+|module|base_layer|base_model|lora_\w+)\.")
"""Parts of tensor names that occur only if a model was saved inside a wrapper."""
_LAYER = re.compile(r"^(.*?)\.(\d+)\.")
_HEAD = re.compile(r"head|embed_out|output")


def expect_loadable_models(work: Work, *, captured: bool) -> None:
    """Refuse models that stage one or stage two would refuse, as far as their files show it.

    captured  whether both stores are complete, so that the teacher's weights are not needed

    Raises
        ColdstillError: weights that do not belong to the checkpoint, or code that is not allowed
    """
    teacher = named_teacher(work)
    models = [*student_models(work)]
    if teacher is not None and not captured:
        models.insert(0, teacher)
    for named in models:
        folder = folder_of(work, named.model, named.revision)
        if folder is not None and _is_unusual(folder, own_code=named.own_code):
            _expect_usable(work, named)


def expect_packable_students(work: Work) -> None:
    """Refuse students whose family cannot learn from the packed store that the teacher will make.

    Raises
        ColdstillError: the first such student, and what to set
    """
    recipe = work.recipe
    record = CorpusLayout(work.run.corpus).read_record()
    if not recipe.corpus.pack or recipe.teacher.generate or (record and not record.together):
        return
    for name, student in recipe.students.items():
        family = student_family(work, student)
        own = student.architecture is not None or student.model is not None
        if own and family in UNPACKED and not work.run.student(name).model.exists():
            if teacher_family(work) in UNPACKED:
                return  # the teacher's store will not be packed
            raise ColdstillError(
                f"students.{name}: a {family!r} model cannot keep packed documents apart, so it "
                "cannot learn from a packed store; set corpus.pack = false before the teacher is "
                "captured, or choose another family"
            )


def expect_holding_formats(work: Work) -> None:
    """Refuse students whose sizes the format of `quantize` cannot hold, as far as they are known.

    Raises
        ColdstillError: the first such student
    """
    students = {
        name: student
        for name, student in work.recipe.students.items()
        if student.quantize and not work.run.student(name).model.exists()
    }
    if not students:
        return  # nothing to check, so torch is not loaded
    from ...stages.models.grids import SCHEMES

    sizes = student_sizes(work, teacher_sizes(work))
    for name, student in students.items():
        assert student.quantize is not None
        block = SCHEMES[student.quantize.scheme].layers.block
        if block is None or not sizes[name]:
            continue
        last, chosen = sizes[name][-1], "architecture" if student.architecture else "prune"
        widths, remedy = [last.hidden], f"choose sizes of {chosen} that are"
        if student.model is not None or student.layers is not None:
            remedy = "take a model with sizes that are"
        else:  # the feed-forward layers of a model may have several sizes
            widths.append(last.feed_forward)
        if wrong := [width for width in widths if width % block]:
            raise ColdstillError(
                f"students.{name}.quantize: {student.quantize.scheme} has one scale for every "
                f"{block} inputs of a layer, and its layers have {wrong[0]:,}; {remedy} "
                f"multiples of {block}, or quantize = 'int8-row'"
            )


def expect_usable_students(work: Work) -> None:
    """Refuse students that start from a model which cannot be loaded, or whose tokens are others
    than those of an existing teacher and cannot be aligned with them, or are not for what the
    recipe asks, or that need a package which is not installed. Called before a whole run captures
    its teacher.

    Raises
        ColdstillError: the first such student
    """
    from ...stages.models.vocabulary import tokenizer_identity
    from ...stages.student_tokens import expect_alignable
    from ...stages.students.lesson import expect_packages

    for name, student in work.recipe.students.items():
        if not work.run.student(name).model.exists():
            expect_packages(student.quantize, student.lora, f"students.{name}")
    teacher = named_teacher(work)
    for named in student_models(work):
        tokenizer = _expect_usable(work, named)
        name = named.key.removeprefix("students.").removesuffix(".model")
        if teacher is not None:
            own = tokenizer_of_model(work, teacher)
            expect_alignable(own, tokenizer, f"students.{name}")
            own_tokens(work, name, work.recipe.student(name), tokenizer_identity(own).fingerprint)


def _expect_usable(work: Work, named: NamedModel) -> Any:
    """Refuse a model that cannot be loaded or whose tokenizer does not fit; return the latter."""
    from ...stages.models.loading import expect_loadable
    from ..quiet import quiet_libraries

    quiet_libraries()  # `coldstill plan` has not done it
    expect_loadable(work.local(named.model), named.key, named.revision, own_code=named.own_code)
    return tokenizer_of_model(work, named)


def _is_unusual(folder: Path, *, own_code: bool) -> bool:
    """Whether the files of a model are a reason to ask transformers."""
    try:
        config = _table(folder / "config.json")
        of_tokenizer = _table(folder / "tokenizer_config.json")
        if not own_code and (config.get("auto_map") or of_tokenizer.get("auto_map")):
            return True
        files = weight_files_in(folder)
        if not files:
            return False  # they may be on the machine that captures
        if files[0].suffix != ".safetensors":
            return zipfile.is_zipfile(files[0])  # an older format would be read as a whole
        index = next((p for name in ORDER if (p := folder / name).is_file()), files[0])
        if index.name.endswith(INDEX_END) and len(files) < len(shards(index)):
            return True
        return _has_unusual_tensors(
            tensor_shapes(files), {**config, **(config.get("text_config") or {})}
        )
    except (ColdstillError, OSError, ValueError, TypeError):
        return True


def _has_unusual_tensors(shapes: Mapping[str, tuple[int, ...]], config: dict[str, Any]) -> bool:
    """Whether tensors are missing, additional or other than those of a plain model of this size."""
    if any(_WRAPPED.search(key) for key in shapes):
        return True
    layers = [found for key in shapes if (found := _LAYER.match(key))]
    counts = Counter(int(found[2]) for found in layers)
    if {*counts} != {*range(size_in(config, "layers"))} or len({*counts.values()}) != 1:
        return True
    if any(found[1].count(".") > 1 for found in layers):
        return True  # the usual names have a prefix
    tied = bool(config.get("tie_word_embeddings", False))
    if tied is any(_HEAD.search(key) for key in shapes):
        return True
    rows = config.get("vocab_size")
    return not any(shape[0] == rows for shape in shapes.values() if len(shape) > 1)


def _table(path: Path) -> dict[str, Any]:
    found = read_json(path) if path.is_file() else {}
    return found if isinstance(found, dict) else {}


_NEEDED = ("bos_token", "eos_token", "unk_token", "pad_token")
_DOCUMENTS = 20_000
"""Documents that are searched for such tokens if the corpus is not prepared yet."""


def left_out_tokens(work: Work) -> list[str]:
    """Tokens that stage one will leave out of the vocabulary.

    Raises
        ColdstillError: a token that is refused, because the teacher or a student needs it or a text
            contains it
    """
    from ...stages.models.vocabulary import rowless_in

    for named in student_models(work):
        _rowless(folder_of(work, named.model, named.revision), named.key)
    table, corpus = work.recipe.teacher, work.recipe.corpus
    if table.model is None:
        return []
    rowless = _rowless(folder_of(work, table.model, table.revision), "teacher.model")
    for token in rowless:
        if token in (corpus.separator or ""):
            raise ColdstillError(f"corpus.separator: {rowless_in(token)}")
    prepared = CorpusLayout(work.run.corpus).read_record() is not None
    if rowless and corpus.bad_rows != "skip" and not prepared:
        _expect_in_no_text(work, rowless)
    return sorted(rowless)


def _rowless(folder: Path | None, where: str) -> list[str]:
    """Tokens of a tokenizer for which its model has no row and which are not needed.

    Raises
        ColdstillError: a token is needed
    """
    found = None if folder is None else _read_tokens(folder)
    if found is None:
        return []
    for token, index in sorted(found.vocabulary.items(), key=lambda pair: pair[1]):
        if index >= found.rows:
            raise _refused(
                where,
                token,
                index,
                found.rows,
                "the token is one of its vocabulary, so any text may contain it",
            )
    rowless = {token: index for token, index in found.added.items() if index >= found.rows}
    for token, index in rowless.items():
        if (role := found.roles.get(token)) is not None:
            use = "sequences are padded with it" if role == "pad_token" else "texts need it"
            raise _refused(where, token, index, found.rows, f"it is its {role}: {use}")
    return list(rowless)


def _refused(where: str, token: str, index: int, rows: int, use: str) -> ColdstillError:
    return ColdstillError(
        f"{where}: its tokenizer has the token {token!r} at id {index}, its model has {rows} rows "
        f"(ids 0 to {rows - 1}), and {use}; take the token out of the tokenizer's files, or "
        "resize the model's embeddings and train the new row"
    )


def _expect_in_no_text(work: Work, tokens: list[str]) -> None:
    from ...stages.models.vocabulary import rowless_in

    corpus = work.recipe.corpus
    columns = corpus.columns
    if work.recipe.teacher.generate is not None:
        columns = columns.for_prompts()
    sources = list_sources(corpus.files, work.loaded.base)
    for document in islice(read_documents(sources, columns), _DOCUMENTS):
        text = document.prompt + document.text
        text += json.dumps(document.messages, ensure_ascii=False) if document.messages else ""
        for token in tokens:
            if token in text:
                raise BadRowError("rowless_tokens", document.where, rowless_in(token))


@dataclass(frozen=True, slots=True)
class _Tokens:
    """Tokens of a tokenizer, by id, and the size of its model."""

    rows: int
    """Rows of the model's embedding."""
    vocabulary: dict[str, int]
    added: dict[str, int]
    roles: dict[str, str]
    """Role of each needed token, such as `eos_token`."""


def _read_tokens(folder: Path) -> _Tokens | None:
    """The tokens of a model's folder; None if its files are incomplete."""
    config = _json(folder / "config.json")
    rows = {**config, **(config.get("text_config") or {})}.get("vocab_size")
    tokenizer, settings = _json(folder / "tokenizer.json"), _json(folder / "tokenizer_config.json")
    try:
        vocabulary = tokenizer["model"]["vocab"]
        if isinstance(vocabulary, list):  # a list of pairs of token and score
            vocabulary = {token: index for index, (token, _) in enumerate(vocabulary)}
        added = {each["content"]: each["id"] for each in tokenizer["added_tokens"]}
        decoder = settings.get("added_tokens_decoder") or {}
        added |= {each["content"]: int(index) for index, each in decoder.items()}
    except (AttributeError, KeyError, TypeError, ValueError):
        return None
    if not isinstance(rows, int):
        return None
    base = {token: index for token, index in vocabulary.items() if token not in added}
    roles: dict[str, str] = {}
    for role in _NEEDED:
        named = settings.get(role)
        token = named.get("content") if isinstance(named, dict) else named
        if isinstance(token, str):
            roles[token] = role
            if token not in base and token not in added:  # loading appends it after all others
                added[token] = max([*base.values(), *added.values()], default=-1) + 1
    return _Tokens(rows, base, added, roles)


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}  # loading the model reports it
    return found if isinstance(found, dict) else {}
