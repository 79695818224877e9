"""Checks before stage one that the models of a recipe will load and can be trained.

A plan reads the headers of their files only. It asks transformers, which takes seconds to import,
only if these look unusual.
"""

from __future__ import annotations

import re
import zipfile
from collections import Counter
from typing import TYPE_CHECKING, Any

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
from .models import (
    NamedModel,
    folder_of,
    named_teacher,
    student_family,
    student_models,
    teacher_family,
    tokenizer_of_model,
)

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from ..recipe.work import Work

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


def expect_usable_students(work: Work) -> None:
    """Refuse students that start from a model which cannot be loaded, or which has other tokens
    than an existing teacher. Called before a whole run captures its teacher.

    Raises
        ColdstillError: the first such student
    """
    from ...stages.models.vocabulary import expect_same_tokens

    teacher = named_teacher(work)
    for named in student_models(work):
        tokenizer = _expect_usable(work, named)
        if teacher is not None:
            own = tokenizer_of_model(work, teacher)
            expect_same_tokens(own, tokenizer, named.key.removesuffix(".model"))


def _expect_usable(work: Work, named: NamedModel) -> Any:
    """Refuse a model that cannot be loaded, or whose tokenizer does not fit; return the tokenizer.

    Raises
        ColdstillError: as `expect_loadable`, `load_tokenizer` and `without_rowless`
    """
    from ...stages.models.loading import expect_loadable
    from ..quiet import quiet_libraries

    quiet_libraries()  # the plan command does not
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
