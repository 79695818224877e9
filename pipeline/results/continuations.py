"""Continuations of held-out prompts by a run's models, made once and kept beside the report.

`report/continuations.json` holds token ids, with a hash of every model's files: a model is loaded
again only if it, the prompts or the held-out store have changed.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...data.errors import ColdstillError
from ...data.files import read_json, write_json
from ...data.fingerprint import files_sha256, json_sha256
from ...data.prepared import CorpusLayout
from ...stages.models.weight_files import weight_files_in
from ...stages.report import Report
from ..pages.inspect.tokens import token_texts
from ..quiet import quiet_libraries
from ..recipe.tables import TEACHER

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ...data.store.reader import StoreReader
    from ...stages.continuations import Prompt
    from ..pages.inspect.tokens import TokenTexts
    from ..steps.work import Work

STAGE = "report"
_TEMPERATURE = 0.7
"""At which tokens are drawn: what is hardly probable hardly comes, without a border."""
_VERSION = 2
"""Of the file: another one is made anew."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Author:
    """A model that may write."""

    name: str
    folder: Path
    fingerprint: str
    """SHA-256 over its weights and configuration."""


def continuations(
    work: Work, store: StoreReader, students: Sequence[str], count: int
) -> dict[str, Any]:
    """Prompts, what really came next, and what the teacher and these students make of them, as text
    in a JSON value.

    students  names, in the order in which they are shown

    Raises
        ColdstillError: the held-out store is damaged
    """
    asked = {
        "version": _VERSION,
        "temperature": _TEMPERATURE,
        "heldout": json_sha256(store.manifest.to_json()),
        "seed": work.recipe.seed,
        "count": count,
    }
    kept = _kept(work.run.continuations, asked)
    authors, missing = _authors(work, students)
    known = {} if kept is None else kept["models"]
    lacking = [a for a in authors if known.get(a.name, {}).get("fingerprint") != a.fingerprint]
    if kept is None or lacking:
        quiet_libraries()
        from ...stages.continuations import choose_prompts

        prompts = choose_prompts(store, count, work.recipe.seed, _beginnings(work, store))
        made, failed = _written(work, store, lacking, prompts)
        known, missing = {**known, **made}, {**missing, **failed}
        kept = {**asked, "prompts": [asdict(prompt) for prompt in prompts], "models": known}
        if made or not lacking:
            write_json(work.run.continuations, kept)
    shown = [a.name for a in authors if a.name not in missing]
    return _told(kept, shown, missing, token_texts(store))


def _beginnings(work: Work, store: StoreReader) -> dict[int, int] | None:
    """Where the store's documents begin, by the corpus it was captured from, if that is here."""
    from ...stages.continuations import first_sequences

    layout = CorpusLayout(work.run.corpus)
    try:
        record = layout.read_record()
        if record is None or record.splits["heldout"].packing != store.manifest.packing.fingerprint:
            return None
        return first_sequences(layout.open("heldout"))
    except (ColdstillError, OSError):
        return None


def _kept(path: Path, asked: dict[str, Any]) -> dict[str, Any] | None:
    """What an earlier report has made, if it was asked for the same; a damaged file is none."""
    try:
        value = read_json(path)
    except ColdstillError:
        return None
    if not isinstance(value, dict) or any(value.get(key) != v for key, v in asked.items()):
        return None
    return value if _is_whole(value) else None


def _is_whole(value: dict[str, Any]) -> bool:
    prompts, models = value.get("prompts"), value.get("models")
    if not isinstance(prompts, list) or not isinstance(models, dict):
        return False
    rows = [one.get("written") for one in models.values() if isinstance(one, dict)]
    lists = [
        part
        for one in prompts
        for part in ([one.get("tokens"), one.get("next")] if isinstance(one, dict) else [None])
    ]
    whole = all(isinstance(row, list) and len(row) == len(prompts) for row in rows)
    lists += [row for several in rows if isinstance(several, list) for row in several]
    ends = all(isinstance(one.get("ended"), bool) for one in prompts if isinstance(one, dict))
    ids = all(isinstance(ids, list) and all(isinstance(i, int) for i in ids) for ids in lists)
    return whole and ends and ids and len(rows) == len(models)


def _authors(work: Work, students: Sequence[str]) -> tuple[list[_Author], dict[str, str]]:
    """Those whose folders are on this machine, and of the others why they write nothing."""
    found, missing = [], {}
    folders = {name: work.run.student(name).model for name in students}
    try:
        folders = {TEACHER: Path(work.teacher_model), **folders}
    except ColdstillError as error:
        missing[TEACHER] = str(error)
    for name, folder in folders.items():
        weights = weight_files_in(folder) if folder.is_dir() else []
        if weights:
            files = [*weights, *folder.glob("config.json")]
            found.append(_Author(name=name, folder=folder, fingerprint=files_sha256(files)))
        else:
            missing[name] = "its folder is not on this machine"
    return found, missing


def _written(
    work: Work, store: StoreReader, authors: Sequence[_Author], prompts: Sequence[Prompt]
) -> tuple[dict[str, Any], dict[str, str]]:
    """What each of them writes, and of those that cannot why."""
    made, failed = {}, {}
    stage, total = f"{STAGE} continuations", len(authors)
    if authors:
        work.report(Report(stage=stage, total=total, unit="models"))
    for done, author in enumerate(authors):
        work.report(Report(stage=stage, doing=f"load {author.name} and let it write"))
        try:
            written = _continued(work, store, author, prompts)
        except ColdstillError as error:
            failed[author.name] = str(error)
        except (RuntimeError, MemoryError) as error:  # torch has no room for it, on any device
            first = (str(error).strip() or type(error).__name__).splitlines()[0]
            failed[author.name] = f"{author.folder}: {first[:200]}"
        else:
            made[author.name] = {"fingerprint": author.fingerprint, "written": written}
        work.report(Report(stage=stage, done=done + 1, total=total, step=1, unit="models"))
    return made, failed


def _continued(
    work: Work, store: StoreReader, author: _Author, prompts: Sequence[Prompt]
) -> list[list[int]]:
    from ...stages.continuations import Drawing, continued
    from ...stages.models.ends import own_ends, store_ends
    from ...stages.models.loading import load_tokenizer

    if not prompts:
        return []
    model = _loaded(work, store, author)
    size = store.manifest.tokenizer.size
    drawing = Drawing(seed=work.recipe.seed, temperature=_TEMPERATURE, vocabulary=size)
    # a model that was not trained here, or by an older version, may not know how its texts end
    tokenizer = load_tokenizer(str(store.tokenizer_folder()), str(store.place))
    ends = {*own_ends(model), *store_ends(store, tokenizer).tokens}
    return continued(model, prompts, drawing, frozenset(ends))


def _loaded(work: Work, store: StoreReader, author: _Author) -> Any:
    """The model on this process's device; raises ColdstillError if it cannot be loaded, or is not
    the teacher of the store."""
    from ...stages.models.device import best_device
    from ...stages.models.identity import teacher_identity
    from ...stages.models.loading import load_model

    name = str(author.folder)
    if author.name != TEACHER:
        own_code = work.recipe.trusts(author.name)
        where = f"students.{author.name}"
        return load_model(name, where, precision="fp32", own_code=own_code).to(best_device())
    table, where = work.recipe.teacher, "teacher.model"
    own_code = table.trust_remote_code
    found = teacher_identity(name, where, dtype="auto", revision=table.revision, own_code=own_code)
    if found.fingerprint != store.manifest.teacher.fingerprint:
        raise ColdstillError("what is in its folder by now is another model than was captured")
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


def _told(
    kept: dict[str, Any], names: Sequence[str], missing: dict[str, str], texts: TokenTexts
) -> dict[str, Any]:
    models = {name: kept["models"][name]["written"] for name in names}
    prompts = []
    for place, prompt in enumerate(kept["prompts"]):
        prompts.append(
            {
                "sequence": prompt["sequence"],
                "document": prompt["document"],
                "text": texts.prose(prompt["tokens"], ended=True),
                "tokens": len(prompt["tokens"]),
                "next": texts.prose(prompt["next"], ended=prompt["ended"]),
                "models": {name: texts.prose(rows[place]) for name, rows in models.items()},
            }
        )
    return {
        "seed": kept["seed"],
        "temperature": kept["temperature"],
        "asked": kept["count"],
        "prompts": prompts,
        "missing": missing,
        "note": texts.lack,
    }
