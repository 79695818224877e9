"""Who may import whom, read from the sources with `ast`."""

from __future__ import annotations

import ast
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = ("data", "stages", "pipeline")
FILES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for room in ROOMS
    for path in sorted((ROOT / room).rglob("*.py"))
}
"""Every source file by its name without `coldstill.`, packages by their own."""

DATA_MAY_IMPORT = {"numpy", "pyarrow", "zarr", "fsspec", "pydantic"}
DATA_MAY_ASK = {
    ("datasets", "data.corpus.hub"),
    ("tokenizers", "data.maintenance.verify"),
    ("tokenizers", "data.token_bytes"),
}
"""What one file each imports, inside a function, for those who ask for it."""
LIGHT_STAGES = {
    "stages", "stages.config", "stages.export", "stages.libraries",
    "stages.models.packing_families", "stages.models.size_names", "stages.models.weight_files",
    "stages.ranks", "stages.report", "stages.pruning", "stages.pruning.config",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Import:
    """One imported module, as an absolute name."""

    module: str
    relative: bool
    in_function: bool
    for_types: bool

    @property
    def ours(self) -> bool:
        return self.module.split(".")[0] in ROOMS

    @property
    def at_start(self) -> bool:
        return not (self.in_function or self.for_types)


def imports_of(name: str) -> list[Import]:
    """Every import of a source file; names of this project stand without `coldstill.`."""
    path = FILES[name]
    parts = name.split(".")
    package = parts if path.name == "__init__.py" else parts[:-1]
    found: list[Import] = []

    def visit(node: ast.AST, in_function: bool, for_types: bool) -> None:
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
            found.extend(Import(module, False, in_function, for_types) for module in names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                # one dot is the package itself; past the rooms lies the root, `coldstill`
                kept = package[: len(package) + 1 - node.level]
                base = ".".join([*kept, *([base] if base else [])]) or "coldstill"
            for alias in node.names:
                inner = f"{base}.{alias.name}"
                module = inner if inner in FILES else base
                found.append(Import(module, node.level > 0, in_function, for_types))
        for child in ast.iter_child_nodes(node):
            function = isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
            types = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
            visit(child, in_function or function, for_types or types)

    visit(ast.parse(path.read_text(encoding="utf-8")), False, False)
    return found


GRAPH = {name: imports_of(name) for name in FILES}
every_file = pytest.mark.parametrize("name", list(FILES))


def in_room(*rooms: str) -> list[str]:
    return [name for name in FILES if name.split(".")[0] in rooms]


def reached_from(name: str) -> set[str]:
    """Every module of ours that importing or running this one may load."""
    reached: set[str] = set()
    waiting = [name]
    while waiting:
        for found in GRAPH[waiting.pop()]:
            if found.module in FILES and not found.for_types and found.module not in reached:
                reached.add(found.module)
                waiting.append(found.module)
    return reached


def test_the_reader_of_sources_sees_what_it_should() -> None:
    assert {"data.alignment", "data.codecs.plain", "stages.losses", "pipeline.cli"} <= set(FILES)
    writer = {found.module: found for found in GRAPH["data.writer"]}
    assert writer["data.fidelity"].at_start
    assert writer["data.schema"].for_types
    assert writer["numpy"].at_start
    cli = {found.module: found for found in GRAPH["pipeline.cli"] if not found.for_types}
    assert cli["pipeline.students"].in_function
    assert {"data.ragged", "data.files"} <= reached_from("stages.teacher_logits")


@every_file
def test_the_rooms_are_entered_in_one_direction(name: str) -> None:
    room = name.split(".")[0]
    allowed = ROOMS[: ROOMS.index(room) + 1]
    wrong = [f.module for f in GRAPH[name] if f.ours and f.module.split(".")[0] not in allowed]
    assert wrong == []


@every_file
def test_the_project_imports_itself_relatively(name: str) -> None:
    absolute = [found for found in GRAPH[name] if not found.relative]
    wrong = [f.module for f in absolute if f.ours or f.module.split(".")[0] == "coldstill"]
    assert wrong == []


@pytest.mark.parametrize("name", in_room("data"))
def test_data_needs_no_deep_learning(name: str) -> None:
    for found in GRAPH[name]:
        top = found.module.split(".")[0]
        if found.ours or top in sys.stdlib_module_names or top in DATA_MAY_IMPORT:
            continue
        assert (top, name) in DATA_MAY_ASK, f"{name} imports {found.module}"
        assert found.in_function


@pytest.mark.parametrize("name", in_room("pipeline"))
def test_the_pipeline_imports_nothing_heavy_before_it_must(name: str) -> None:
    light = sys.stdlib_module_names | {"click", "tqdm", "pydantic", "numpy", "coldstill"}
    for found in GRAPH[name]:
        if not found.at_start:
            continue
        if found.ours:
            is_stage = found.module.split(".")[0] == "stages"
            assert not is_stage or found.module in LIGHT_STAGES, f"{name} imports {found.module}"
        else:
            assert found.module.split(".")[0] in light, f"{name} imports {found.module}"


@pytest.mark.parametrize(
    ("package", "shared"),
    [
        ("data.codecs", set()),
        ("data.stores", set()),
        ("stages.losses", {"partition", "record", "sparse"}),
    ],
)
def test_plugins_know_nothing_of_one_another(package: str, shared: set[str]) -> None:
    plugins = [name for name in FILES if name.startswith(f"{package}.")]
    assert plugins
    for name in plugins:
        siblings = {
            found.module.removeprefix(f"{package}.")
            for found in GRAPH[name]
            if found.module.startswith(f"{package}.") or found.module == package
        }
        assert siblings - shared == set(), name


def test_formats_of_export_know_nothing_of_one_another() -> None:
    formats = {f"stages.export.{name}" for name in ("gguf", "hf", "onnx", "torchao")}
    named = {found.module for found in GRAPH["stages.export"] if found.ours and found.at_start}
    assert named == formats
    for name in formats:
        # with the parts that each has in files of its own
        assert reached_from(name) & formats == set(), name
        heavy = [f.module for f in GRAPH[name] if f.at_start and not f.ours]
        assert {module.split(".")[0] for module in heavy} <= sys.stdlib_module_names, name


@pytest.mark.parametrize(
    "name", ["stages.train_student", "stages.training.feed", "stages.evaluate"]
)
def test_a_student_never_meets_the_teacher(name: str) -> None:
    assert (
        reached_from(name)
        & {"stages.teacher_logits", "stages.capture.shards", "stages.train_teacher"}
        == set()
    )


def test_the_teacher_never_meets_a_student() -> None:
    reached = reached_from("stages.teacher_logits")
    assert (
        reached & {"stages.train_student", "stages.training.loop", "stages.training.objective"}
        == set()
    )


def test_one_file_alone_loads_what_transformers_has_saved() -> None:
    """So that no weights come in unlooked at. The estimate of a plan reads a tokenizer alone, by
    its own class: the other file would load torch for it."""
    callers = {
        name
        for name in FILES
        for node in ast.walk(ast.parse(FILES[name].read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute)
        and node.attr == "from_pretrained"
        and ast.unparse(node.value) != "PreTrainedTokenizerFast"
    }
    assert callers == {"stages.models.loading"}


def test_no_module_needs_itself_to_be_imported() -> None:
    finished: set[str] = set()

    def visit(name: str, above: tuple[str, ...]) -> None:
        assert name not in above, " -> ".join([*above, name])
        if name not in finished:
            for found in GRAPH[name]:
                if found.at_start and found.module in FILES:
                    visit(found.module, (*above, name))
            finished.add(name)

    for name in FILES:
        visit(name, ())


@every_file
def test_names_say_what_a_file_is_and_files_stay_short(name: str) -> None:
    vague = {"utils", "util", "helpers", "helper", "common", "manager", "misc"}
    assert not vague & set(name.split("."))
    assert len(FILES[name].read_text(encoding="utf-8").splitlines()) <= 400


@pytest.mark.parametrize("module", ["coldstill.data.reader", "coldstill.pipeline.cli"])
def test_importing_it_loads_no_deep_learning(module: str) -> None:
    code = f"import sys, {module}; print(*sorted(m for m in sys.modules if '.' not in m))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT.anchor
    )
    loaded = set(done.stdout.split())
    assert "coldstill" in loaded
    assert loaded & {"torch", "transformers", "accelerate", "tokenizers", "datasets"} == set()


def test_every_package_is_installed() -> None:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    for name, path in FILES.items():
        if path.name == "__init__.py":
            assert f'"coldstill.{name}"' in text, name


def test_the_sources_of_the_data_room_are_never_ignored() -> None:
    patterns = (ROOT / ".gitignore").read_text(encoding="utf-8").split()
    assert patterns
    assert not {pattern.strip("/*") for pattern in patterns} & {*ROOMS, "tests"}
    assert "/runs/" in patterns


def test_no_room_is_importable_by_its_bare_name() -> None:
    code = (
        "from importlib.util import find_spec\n"
        "print([name for name in ('data', 'stages', 'pipeline') if find_spec(name)])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT.anchor
    )
    assert done.stdout.strip() == "[]"
