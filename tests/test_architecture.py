"""Which module may import which, read from the sources with `ast`."""

from __future__ import annotations

import ast
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).parents[1]
ROOMS = ("data", "stages", "pipeline")
FILES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for room in ROOMS
    for path in sorted((ROOT / room).rglob("*.py"))
    if "examples" not in path.parts  # scripts of a user: they import the public interface
}
"""Every source file by its module name without `coldstill.`."""

PIPELINE_MAY_IMPORT = {"click", "jinja2", "markupsafe", "numpy", "pydantic", "tabulate", "tqdm"}
DATA_MAY_IMPORT = {"numpy", "pyarrow", "zarr", "filelock", "fsspec", "pydantic"}
DATA_MAY_ASK = {
    ("datasets", "data.corpus.hub"),
    ("tokenizers", "data.maintenance.verify"),
    ("tokenizers", "data.retokenized.spelling"),
    ("tokenizers", "data.store_writer"),
    ("safetensors", "data.imports.hidden_states"),
    ("tokenizers", "data.imports.vocabulary_fit"),
    ("tokenizers", "data.tokenizer_files"),
    ("tokenizers", "data.token_bytes"),
}
"""Optional libraries that one file each imports inside a function."""
DATA_MAY_NEED = {("numba", "data.codecs.compact.loops")}
"""Optional libraries that a file needs which no other file imports: it is loaded when it pays."""
LIGHT_STAGES = {
    "stages", "stages.config", "stages.objective_config", "stages.evaluation.lm_eval.results",
    "stages.export", "stages.libraries",
    "stages.models.gguf_file", "stages.models.model_files",
    "stages.planning", "stages.planning.memory", "stages.planning.model_sizes",
    "stages.ranks", "stages.report", "stages.students.pruning", "stages.students.pruning.config",
    "stages.students.pruning.shapes", "stages.students.rounds", "stages.students.rounds.config",
    "stages.planning.rounding", "stages.training", "stages.training.steps",
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
    """Every import of a source file; names of this project lack `coldstill.`."""
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
                # one dot is the package itself; above the rooms is the root, `coldstill`
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


def top(module: str) -> str:
    return module.split(".")[0]


def in_room(*rooms: str) -> list[str]:
    return [name for name in FILES if top(name) in rooms]


def reached_from(name: str) -> set[str]:
    """Every module of this project that importing or running a module may load."""
    reached: set[str] = set()
    waiting = [name]
    while waiting:
        for found in GRAPH[waiting.pop()]:
            if found.module in FILES and not found.for_types and found.module not in reached:
                reached.add(found.module)
                waiting.append(found.module)
    return reached


def test_the_graph_of_imports_is_complete() -> None:
    assert {
        "data.alignment",
        "data.codecs.plain",
        "stages.targets.losses",
        "pipeline.cli.commands",
    } <= set(FILES)
    writer = {found.module: found for found in GRAPH["data.store.writer"]}
    assert writer["data.files"].at_start
    assert writer["data.schema"].for_types
    assert writer["numpy"].at_start
    cli = {found.module: found for found in GRAPH["pipeline.cli.commands"] if not found.for_types}
    assert cli["pipeline.steps.interface"].in_function
    assert {"data.schema", "data.files"} <= reached_from("stages.teacher_logits")


def imports_in(*rooms: str) -> Iterator[tuple[str, Import]]:
    """Every import of every file of these rooms, with the file's name."""
    return ((name, found) for name in in_room(*rooms) for found in GRAPH[name])


def test_rooms_import_in_one_direction() -> None:
    wrong = [
        f"{name} imports {found.module}"
        for name, found in imports_in(*ROOMS)
        if found.ours and ROOMS.index(top(found.module)) > ROOMS.index(top(name))
    ]
    assert wrong == []


def test_rooms_of_the_pipeline_import_downwards() -> None:
    floors = ("recipe", "planning", "results", "pages", "steps", "launch", "cli")
    wrong = []
    for name, found in imports_in("pipeline"):
        one, other = name.split(".")[1:2], found.module.split(".")[1:2]
        if top(found.module) != "pipeline" or one == other or not other or other[0] not in floors:
            continue
        if one[0] not in floors or floors.index(other[0]) > floors.index(one[0]):
            wrong.append(f"{name} imports {found.module}")
    assert wrong == []


def test_the_project_imports_itself_relatively() -> None:
    wrong = [
        f"{name} imports {found.module}"
        for name, found in imports_in(*ROOMS)
        if not found.relative and (found.ours or top(found.module) == "coldstill")
    ]
    assert wrong == []


def test_data_imports_no_deep_learning() -> None:
    allowed = sys.stdlib_module_names | DATA_MAY_IMPORT
    wrong = [
        f"{name} imports {found.module}"
        for name, found in imports_in("data")
        if not found.ours
        and top(found.module) not in allowed
        and not ((top(found.module), name) in DATA_MAY_ASK and found.in_function)
        and (top(found.module), name) not in DATA_MAY_NEED
    ]
    assert wrong == []
    needing = {name for _, name in DATA_MAY_NEED}
    assert [name for name, found in imports_in(*ROOMS) if found.module in needing] == []


def test_the_pipeline_imports_nothing_heavy_at_start() -> None:
    light = sys.stdlib_module_names | PIPELINE_MAY_IMPORT | {"coldstill"}
    wrong = [
        f"{name} imports {found.module}"
        for name, found in imports_in("pipeline")
        if found.at_start
        and (
            (top(found.module) == "stages" and found.module not in LIGHT_STAGES)
            if found.ours
            else top(found.module) not in light
        )
    ]
    assert wrong == []


@pytest.mark.parametrize(
    ("package", "shared"),
    [
        ("data.codecs", set()),
        ("data.formats", {"packed_zarr"}),
        ("stages.targets.losses", {"loss"}),
    ],
)
def test_plugins_do_not_import_one_another(package: str, shared: set[str]) -> None:
    plugins = [name for name in FILES if name.startswith(f"{package}.")]
    assert plugins
    for name in plugins:
        own = name.removeprefix(f"{package}.").split(".")[0]
        siblings = {
            found.module.removeprefix(f"{package}.").split(".")[0]
            for found in GRAPH[name]
            if found.module.startswith(f"{package}.") or found.module == package
        }
        if name != "data.codecs.version2":  # older forms of the other codecs
            assert siblings - shared - {own} == set(), name


def test_formats_of_export_do_not_import_one_another() -> None:
    formats = {f"stages.export.{name}" for name in ("gguf.format", "onnx.format", "pytorch")}
    named = {found.module for found in GRAPH["stages.export"] if found.ours and found.at_start}
    assert named == formats
    for name in formats:
        assert reached_from(name) & formats == set(), name
        heavy = [f.module for f in GRAPH[name] if f.at_start and not f.ours]
        assert {module.split(".")[0] for module in heavy} <= sys.stdlib_module_names, name


@pytest.mark.parametrize(
    "name", ["stages.train_student", "stages.training.feed", "stages.evaluate"]
)
def test_training_a_student_never_imports_the_capture(name: str) -> None:
    assert (
        reached_from(name)
        & {"stages.teacher_logits", "stages.capture.shards", "stages.train_teacher"}
        == set()
    )


def test_the_capture_never_imports_the_training() -> None:
    reached = reached_from("stages.teacher_logits")
    assert (
        reached & {"stages.train_student", "stages.training.loop", "stages.training.objective"}
        == set()
    )


def test_one_file_alone_calls_from_pretrained() -> None:
    """That file checks all weights. The estimate of a plan reads only a tokenizer, by the class of
    tokenizers: the other file would load torch for it."""
    callers = {
        name
        for name in FILES
        for node in ast.walk(ast.parse(FILES[name].read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute)
        and node.attr == "from_pretrained"
        and ast.unparse(node.value) != "PreTrainedTokenizerFast"
    }
    assert callers == {"stages.models.loading"}


def test_no_import_is_circular() -> None:
    finished: set[str] = set()

    def visit(name: str, above: tuple[str, ...]) -> None:
        assert name not in above, " -> ".join([*above, name])
        if name not in finished:
            for found in GRAPH[name]:
                if found.module in FILES:  # in functions and for types, too
                    visit(found.module, (*above, name))
            finished.add(name)

    for name in FILES:
        visit(name, ())


def test_file_names_are_precise_and_files_are_short() -> None:
    vague = {"utils", "util", "helpers", "helper", "common", "manager", "misc"}
    assert [name for name in FILES if vague & set(name.split("."))] == []
    lines = {name: len(path.read_text("utf-8").splitlines()) for name, path in FILES.items()}
    assert {name: count for name, count in lines.items() if count > 400} == {}


@pytest.mark.parametrize(
    "module", ["coldstill.data.store.reader", "coldstill.pipeline.cli.commands"]
)
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
