"""Whether the models that a recipe names will load, asked before a teacher is paid for.

A plan reads the headers of their files alone. Only where these are unusual does it ask
transformers, which takes seconds to import and then says what is wrong, or that all is well.
"""

from __future__ import annotations

import re
import zipfile
from collections import Counter
from typing import TYPE_CHECKING, Any

from ...data.errors import ColdstillError
from ...data.files import read_json
from ...data.prepared import CorpusLayout
from ...stages.models.packing_families import UNPACKED
from ...stages.models.size_names import size_in
from ...stages.models.weight_files import INDEX_END, ORDER, shards, weight_files_in
from ...stages.report import silent
from ..steps.work import Work

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from ..recipe.reading import LoadedRecipe
    from ..recipe.run_folder import Run

_WRAPPED = re.compile(r"(^|\.)(_\w+|module|base_layer|base_model|lora_\w+)\.")
"""Parts of tensor names that only models inside of others have."""
_LAYER = re.compile(r"^(.*?)\.(\d+)\.")
_HEAD = re.compile(r"head|embed_out|output")


def expect_loadable_models(loaded: LoadedRecipe, run: Run, *, captured: bool) -> None:
    """Refuse models that stage one or stage two would refuse, as far as their files show it.

    captured  whether the teacher has been asked already, so that its weights are not needed

    Raises
        ColdstillError: weights that are not the checkpoint's, code that is not allowed
    """
    teacher = loaded.recipe.teacher
    models = [*own_models(loaded, run)]
    if teacher.model is not None and not captured:
        own = teacher.trust_remote_code
        models.insert(0, ("teacher.model", teacher.model, teacher.revision, own))
    for where, model, revision, own_code in models:
        folder = folder_of(loaded, run, model, revision)
        if folder is not None and _is_unusual(folder, own_code=own_code):
            expect_usable(Work(loaded, run, silent).local(model), where, revision, own_code)


def expect_packable_students(loaded: LoadedRecipe, run: Run) -> None:
    """Refuse students whose family cannot learn from the packed store that the teacher will make.

    Raises
        ColdstillError: the first such student, and what to set
    """
    from .memory import student_family

    recipe = loaded.recipe
    record = CorpusLayout(run.corpus).read_record()
    if not recipe.corpus.pack or recipe.teacher.generate or (record and not record.together):
        return
    for name, student in recipe.students.items():
        family = student_family(loaded, run, student)
        own = student.architecture is not None or student.model is not None
        if own and family in UNPACKED and not run.student(name).model.exists():
            if _teacher_family(loaded, run) in UNPACKED:
                return  # its store will not be packed
            raise ColdstillError(
                f"students.{name}: a {family!r} model cannot keep packed documents apart, so it "
                "cannot learn from a packed store; set corpus.pack = false before the teacher is "
                "captured, or choose another family"
            )


def _teacher_family(loaded: LoadedRecipe, run: Run) -> str | None:
    from ...stages.planning.model_sizes import family_of_model

    teacher = loaded.recipe.teacher
    if teacher.architecture is not None:
        return teacher.architecture.family
    assert teacher.model is not None
    folder = folder_of(loaded, run, teacher.model, teacher.revision)
    return None if folder is None else family_of_model(str(folder))


def own_models(loaded: LoadedRecipe, run: Run) -> Iterator[tuple[str, str, str, bool]]:
    """Key, model, revision, and whether its own code may run, of each student that is not trained
    yet and begins with a model of its own."""
    for name, student in loaded.recipe.students.items():
        if student.model is not None and not run.student(name).model.exists():
            yield f"students.{name}.model", student.model, "main", student.trust_remote_code


def folder_of(loaded: LoadedRecipe, run: Run, model: str, revision: str) -> Path | None:
    """Where a model lies on this machine; None if it does not."""
    from ...stages.planning.model_sizes import model_folder

    try:
        return model_folder(Work(loaded, run, silent).local(model), revision)
    except ColdstillError:
        return None  # a folder that is not there is told by the step that needs it


def expect_usable(name: str, where: str, revision: str, own_code: bool) -> Any:
    """Refuse a model that cannot be loaded, or whose tokenizer does not fit it; its tokenizer.

    Raises
        ColdstillError: as `expect_loadable`, `load_tokenizer` and `without_rowless`
    """
    from ...stages.models.loading import expect_loadable, load_config, load_tokenizer
    from ...stages.models.vocabulary import vocabulary_rows, without_rowless
    from ..quiet import quiet_libraries

    quiet_libraries()  # a plan has not done so
    expect_loadable(name, where, revision, own_code=own_code)
    tokenizer = load_tokenizer(name, where, revision, own_code=own_code)
    rows = vocabulary_rows(load_config(name, where, revision, own_code=own_code))
    return without_rowless(tokenizer, rows, where)


def expect_usable_students(work: Work) -> None:
    """Refuse students that begin with a model which cannot be loaded, or has other tokens than a
    teacher that exists: a whole run should not find that out behind the teacher.

    Raises
        ColdstillError: the first such student
    """
    from ...stages.models.vocabulary import expect_same_tokens
    from ..steps.teacher import tokenizer_of

    exists = work.recipe.teacher.model is not None
    for where, model, revision, own_code in own_models(work.loaded, work.run):
        theirs = expect_usable(work.local(model), where, revision, own_code)
        if exists:
            expect_same_tokens(tokenizer_of(work), theirs, where.removesuffix(".model"))


def _is_unusual(folder: Path, *, own_code: bool) -> bool:
    """Whether the files give a reason to ask transformers."""
    try:
        config = _table(folder / "config.json")
        of_tokenizer = _table(folder / "tokenizer_config.json")
        if not own_code and (config.get("auto_map") or of_tokenizer.get("auto_map")):
            return True
        files = weight_files_in(folder)
        if not files:
            return False  # they may be on the machine that captures
        if files[0].suffix != ".safetensors":
            return zipfile.is_zipfile(files[0])  # an older one would be read as a whole
        index = next((p for name in ORDER if (p := folder / name).is_file()), files[0])
        if index.name.endswith(INDEX_END) and len(files) < len(shards(index)):
            return True
        return _are_unusual(_shapes(files), {**config, **(config.get("text_config") or {})})
    except (ColdstillError, OSError, ValueError, TypeError):
        return True


def _are_unusual(shapes: dict[str, list[int]], config: dict[str, Any]) -> bool:
    """Whether tensors are more, fewer or other ones than a plain model of this size has."""
    if any(_WRAPPED.search(key) for key in shapes):
        return True
    layers = [found for key in shapes if (found := _LAYER.match(key))]
    counts = Counter(int(found[2]) for found in layers)
    if {*counts} != {*range(size_in(config, "layers"))} or len({*counts.values()}) != 1:
        return True
    if any(found[1].count(".") > 1 for found in layers):
        return True  # a part stands before the usual names
    tied = bool(config.get("tie_word_embeddings", False))
    if tied is any(_HEAD.search(key) for key in shapes):
        return True
    rows = config.get("vocab_size")
    return not any(shape[0] == rows for shape in shapes.values() if len(shape) > 1)


def _shapes(files: list[Path]) -> dict[str, list[int]]:
    from safetensors import SafetensorError, safe_open

    found: dict[str, list[int]] = {}
    for path in files:
        try:
            with safe_open(path, "np") as tensors:
                for key in tensors.keys():  # noqa: SIM118
                    found[key] = tensors.get_slice(key).get_shape()
        except SafetensorError as error:
            raise ValueError(str(error)) from error
    return found


def _table(path: Path) -> dict[str, Any]:
    found = read_json(path) if path.is_file() else {}
    return found if isinstance(found, dict) else {}
