"""Continuations of held-out prompts by a run's models, generated once and kept.

`report/continuations.json` holds token ids and a hash of every model's files. A model is loaded
again only if its files, the prompts or the held-out store have changed.
"""

from __future__ import annotations

import itertools
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from ...data.errors import ColdstillError
from ...data.files import files_sha256, json_sha256, write_json
from ...data.prepared import CorpusLayout
from ...stages.models.model_files import weight_files_in
from ...stages.report import Report
from ..quiet import quiet_libraries
from ..recipe.tables import TEACHER
from .figures import ModelFigures, Record
from .token_texts import token_texts

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from ...data.store.reader import StoreReader
    from ...stages.continuations import Prompt
    from ..recipe.work import Work
    from .token_texts import TokenTexts

STAGE = "report"
_TEMPERATURE, _GREEDY = 0.7, 1e-3
"""Sampling temperature of texts; below 1, improbable tokens are rare without a hard cut.
`_GREEDY` replaces temperature 0, by which logits cannot be divided."""
_VERSION = 2
"""Version of the file; continuations of another version are generated again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptTexts:
    """One prompt, what followed it in the document, and each model's continuation."""

    sequence: int
    document: int
    text: str
    tokens: int
    next: str
    models: dict[str, str]
    """Continuations by the names of the models."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Continuations:
    seed: int
    temperature: float
    asked: int
    """Number of prompts asked for; a small store gives fewer."""
    prompts: list[PromptTexts]
    missing: dict[str, str]
    """Models without continuations, and the reason."""
    note: str
    """Reason why token ids are shown instead of text, or empty."""
    framed: bool = False
    """Whether tokens that all prompts begin or end with, those of a chat template, are left out."""


class _KeptPrompt(Record):
    sequence: int
    document: int
    tokens: tuple[int, ...]
    next: tuple[int, ...]
    ended: bool


class _Written(Record):
    fingerprint: str
    written: tuple[tuple[int, ...], ...]
    """New tokens for each prompt."""


class _Kept(Record):
    """The file: what was asked for, the prompts, and what the models wrote."""

    version: int
    temperature: float
    heldout: str
    seed: int
    count: int
    prompts: tuple[_KeptPrompt, ...] = ()
    models: dict[str, _Written] = Field(default_factory=dict)

    @property
    def request(self) -> tuple[Any, ...]:
        return self.version, self.temperature, self.heldout, self.seed, self.count


@dataclass(frozen=True, slots=True, kw_only=True)
class _Author:
    """A model whose files are on this machine."""

    name: str
    folder: Path
    fingerprint: str
    """SHA-256 over its weights and configuration."""


def continuations(
    work: Work, store: StoreReader, students: Sequence[str], count: int
) -> Continuations:
    """Prompts of the held-out store with the continuations of the teacher and these students.

    students  names, in the order in which they are shown
    count     number of prompts
    """
    asked = _Kept(
        version=_VERSION,
        temperature=_temperature(work),
        heldout=json_sha256(store.manifest.to_json()),
        seed=work.recipe.seed,
        count=count,
    )
    kept = _read(work.run.continuations, asked)
    authors, missing = _authors(work, students)
    known = {} if kept is None else kept.models
    lacking = [
        author
        for author in authors
        if author.name not in known or known[author.name].fingerprint != author.fingerprint
    ]
    if kept is None or lacking:
        quiet_libraries()
        from ...stages.continuations import choose_prompts

        prompts = choose_prompts(store, count, work.recipe.seed, _beginnings(work, store))
        made, failed = _written(work, store, lacking, prompts)
        missing |= failed
        rows = tuple(_KeptPrompt(**asdict(prompt)) for prompt in prompts)
        kept = asked.model_copy(update={"prompts": rows, "models": {**known, **made}})
        if made or not lacking:
            write_json(work.run.continuations, kept.model_dump(mode="json"))
    shown = [author.name for author in authors if author.name not in missing]
    return _as_text(kept, shown, missing, token_texts(store))


def _temperature(work: Work) -> float:
    """The sampling temperature: that of the teacher's answers, if it answers prompts."""
    generate = work.recipe.teacher.generate
    return _TEMPERATURE if generate is None else max(generate.temperature, _GREEDY)


def _beginnings(work: Work, store: StoreReader) -> dict[int, int] | None:
    """The sequence in which each document begins; None without the corpus of this store."""
    from ...stages.continuations import first_sequences

    layout = CorpusLayout(work.run.corpus)
    try:
        record = layout.read_record()
        if record is None or record.splits["heldout"].packing != store.manifest.packing.fingerprint:
            return None
        return first_sequences(layout.open("heldout"))
    except (ColdstillError, OSError):
        return None


def _read(path: Path, asked: _Kept) -> _Kept | None:
    """The file of an earlier report if it was asked for the same; None if it is damaged."""
    try:
        kept = _Kept.read(path, "")
    except ColdstillError:
        return None
    whole = all(len(model.written) == len(kept.prompts) for model in kept.models.values())
    return kept if whole and kept.request == asked.request else None


def _authors(work: Work, students: Sequence[str]) -> tuple[list[_Author], dict[str, str]]:
    """The models whose folders are on this machine, and for each other one the reason."""
    found, missing = [], {}
    folders = {name: work.run.student(name).model for name in students}
    try:
        folders = {TEACHER: Path(work.teacher_model), **folders}
    except ColdstillError as error:
        missing[TEACHER] = str(error)
    for name in students:
        if _has_other_tokens(work.run.student(name).evaluation):
            missing[name] = "it has other tokens than the teacher, whose prompts these are"
            del folders[name]
    for name, folder in folders.items():
        weights = weight_files_in(folder) if folder.is_dir() else []
        if weights:
            files = [*weights, *folder.glob("config.json")]
            found.append(_Author(name=name, folder=folder, fingerprint=files_sha256(files)))
        else:
            missing[name] = "its folder is not on this machine"
    return found, missing


def _has_other_tokens(evaluation: Path) -> bool:
    return evaluation.exists() and ModelFigures.read(evaluation, "").tokens is not None


def _written(
    work: Work, store: StoreReader, authors: Sequence[_Author], prompts: Sequence[Prompt]
) -> tuple[dict[str, _Written], dict[str, str]]:
    """What each model writes, and for each one that fails the reason."""
    made, failed = {}, {}
    stage, total = f"{STAGE} continuations", len(authors)
    if authors:
        work.report(Report(stage=stage, total=total, unit="models"))
    for done, author in enumerate(authors):
        work.report(Report(stage=stage, doing=f"load {author.name} and generate text"))
        try:
            written = _continued(work, store, author, prompts)
        except ColdstillError as error:
            failed[author.name] = str(error)
        except (RuntimeError, MemoryError) as error:  # torch has no room for it, on any device
            first = (str(error).strip() or type(error).__name__).splitlines()[0]
            failed[author.name] = f"{author.folder}: {first[:200]}"
        else:
            made[author.name] = _Written(fingerprint=author.fingerprint, written=written)
        work.report(Report(stage=stage, done=done + 1, total=total, step=1, unit="models"))
    return made, failed


def _continued(
    work: Work, store: StoreReader, author: _Author, prompts: Sequence[Prompt]
) -> tuple[tuple[int, ...], ...]:
    from ...stages.continuations import Drawing, continued
    from ...stages.models.ends import own_ends, store_ends
    from ...stages.models.loading import load_tokenizer

    if not prompts:
        return ()
    model = _loaded(work, store, author)
    size = store.manifest.tokenizer.size
    drawing = Drawing(seed=work.recipe.seed, temperature=_temperature(work), vocabulary=size)
    # a model that was trained elsewhere may not know the token that ends a text
    tokenizer = load_tokenizer(str(store.tokenizer_folder()), str(store.place))
    ends = {*own_ends(model), *store_ends(store, tokenizer).tokens}
    return tuple(map(tuple, continued(model, prompts, drawing, frozenset(ends))))


def _loaded(work: Work, store: StoreReader, author: _Author) -> Any:
    """The model on this process's device.

    Raises
        ColdstillError: it cannot be loaded, or it is not the teacher of the store
    """
    from ...stages.models.device import best_device
    from ...stages.models.loading import load_model, teacher_identity

    name = str(author.folder)
    if author.name != TEACHER:
        own_code = work.recipe.trusts(author.name)
        where = f"students.{author.name}"
        return load_model(name, where, precision="fp32", own_code=own_code).to(best_device())
    table, where = work.recipe.teacher, "teacher.model"
    own_code = table.trust_remote_code
    found = teacher_identity(name, where, dtype="auto", revision=table.revision, own_code=own_code)
    if found.fingerprint != store.manifest.teacher.fingerprint:
        raise ColdstillError("its folder holds another model than the one that was captured")
    spread = None if table.device_map is None else {"device_map": table.device_map}
    model = load_model(
        name,
        where,
        precision=table.dtype,
        attention=table.attention,
        own_code=own_code,
        options=spread,
    )
    return model if spread else model.to(best_device())


def _as_text(
    kept: _Kept, names: Sequence[str], missing: dict[str, str], texts: TokenTexts
) -> Continuations:
    before, after = template_frame([prompt.tokens for prompt in kept.prompts], texts.is_special)
    prompts = [
        PromptTexts(
            sequence=prompt.sequence,
            document=prompt.document,
            text=texts.prose(prompt.tokens[before : len(prompt.tokens) - after], ended=True),
            tokens=len(prompt.tokens),
            next=texts.prose(prompt.next, ended=prompt.ended),
            models={name: texts.prose(kept.models[name].written[place]) for name in names},
        )
        for place, prompt in enumerate(kept.prompts)
    ]
    return Continuations(
        seed=kept.seed,
        temperature=kept.temperature,
        asked=kept.count,
        prompts=prompts,
        missing=missing,
        note=texts.lack,
        framed=before + after > 0,
    )


def template_frame(
    prompts: Sequence[tuple[int, ...]], is_special: Callable[[int], bool]
) -> tuple[int, int]:
    """Numbers of tokens of a chat template with which all prompts begin and end; 0 for plain texts,
    which can begin alike too."""
    if len(prompts) < 2:
        return 0, 0
    before, after = _shared(prompts), _shared([prompt[::-1] for prompt in prompts])
    # the first token of a plain text may mark its beginning
    if not any(map(is_special, prompts[0][1:before])):
        return 0, 0
    # the template's end begins with a mark; before it all prompts may have a question mark
    while after and not is_special(prompts[0][-after]):
        after -= 1
    return (before, after) if before + after < min(map(len, prompts)) else (0, 0)


def _shared(rows: Sequence[tuple[int, ...]]) -> int:
    """Number of tokens with which all rows begin."""
    same = (len(set(column)) == 1 for column in zip(*rows, strict=False))
    return sum(itertools.takewhile(bool, same))
