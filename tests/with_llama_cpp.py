"""Run a command with llama.cpp, where it can be had without compiling it: `make test-llama`.

llama-cpp-python compiles llama.cpp for many minutes, but its bindings are plain Python. The wheel
xllamacpp has llama.cpp with its C interface in an extension module. This script installs both into
one folder and lets the linker make the library that the bindings look for: it depends on the
extension, and adds the functions that the extension lacks and that nothing here calls.

The bindings pass structures by value. A pair of versions is accepted only if the library writes
exactly those bytes of each structure that the bindings read as its fields.

    python tests/with_llama_cpp.py FOLDER COMMAND ...
"""

from __future__ import annotations

import ctypes
import os
import platform
import re
import shutil
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

BINDINGS, LIBRARY = "llama-cpp-python==0.3.35", "xllamacpp==2026.8.10566"
PACKAGES = (BINDINGS, LIBRARY, "diskcache==5.6.3")
"""Versions that agree. Only the bindings need diskcache; the tests have all else that they need."""
UNUSED = {
    "llama_max_parallel_sequences",
    "llama_model_quantize",
    "llama_model_quantize_default_params",
}
"""Functions that the extension lacks, because it does not call them."""
STRUCTURES = {
    "llama_model_default_params": "llama_model_params",
    "llama_context_default_params": "llama_context_params",
}
"""Functions that return a structure through a pointer, and its name in the bindings."""
_ROOM = 256
"""Bytes behind a structure, in which a longer one of the library would show."""


def main() -> None:
    """Install what is missing, then become the command."""
    folder, command = Path(sys.argv[1]).resolve(), sys.argv[2:]
    done = folder / "installed"
    wanted = "\n".join(PACKAGES)
    if not done.is_file() or done.read_text(encoding="utf-8") != wanted:
        reason = _install(folder)
        if reason is not None:
            print(f"llama.cpp is not tested: {reason}")
            return
        _link(folder)
        _compare(folder)
        done.write_text(wanted, encoding="utf-8")
    known = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(folder), *([known] if known else [])])
    os.execvp(command[0], command)


def _install(folder: Path) -> str | None:
    """Install the packages, and return why that is impossible here; None if they are installed."""
    if (sys.platform, platform.machine()) != ("linux", "x86_64"):
        return f"its pair of packages is for Linux on x86_64, this is {platform.platform()}"
    shutil.rmtree(folder, ignore_errors=True)
    name = BINDINGS.partition("==")[0]
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    # without pip's cache, which would offer the bindings without a library to other environments
    options = ["--no-cache-dir", "--no-deps", "--target", str(folder), "--no-binary", name]
    settings = {**os.environ, "CMAKE_ARGS": "-DLLAMA_BUILD=OFF"}
    done = subprocess.run(
        [*pip, *options, *PACKAGES], env=settings, capture_output=True, text=True, check=False
    )
    if done.returncode == 0:
        return None
    lines = [line for line in done.stderr.splitlines() if "error" in line.lower()]
    return f"pip cannot install {' '.join(PACKAGES)}: {(lines or ['no message'])[-1].strip()}"


def _link(folder: Path) -> None:
    """Make the library that the bindings look for.

    Raises
        SystemExit: the extension lacks a function that is not in `UNUSED`
    """
    (extension,) = folder.glob("xllamacpp/xllamacpp*.so")
    library = ctypes.CDLL(str(extension))
    source = (folder / "llama_cpp" / "llama_cpp.py").read_text(encoding="utf-8")
    names = set(re.findall(r'@ctypes_function\(\s*"(\w+)"', source))
    missing = {name for name in names if not hasattr(library, name)}
    if not names or missing - UNUSED:
        sys.exit(f"{LIBRARY} does not fit {BINDINGS}: it lacks {sorted(missing - UNUSED)}")
    path = folder / "llama_cpp" / "lib" / "libllama.so"
    path.parent.mkdir(exist_ok=True)
    functions = "".join(f"void {name}(void) {{ __builtin_trap(); }}\n" for name in sorted(missing))
    place = "-Wl,-rpath,$ORIGIN/../../xllamacpp"
    needed = ["-Wl,--no-as-needed", f"-L{extension.parent}", f"-l:{extension.name}", place]
    compiler = os.environ.get("CC", "cc")
    subprocess.run(
        [compiler, "-shared", "-o", str(path), "-x", "c", "-", *needed],
        input=functions, text=True, check=True,
    )  # fmt: skip


def _compare(folder: Path) -> None:
    """Compare the structures of the bindings with those of the library.

    Raises
        SystemExit: they differ
    """
    sys.path.insert(0, str(folder))
    bindings: Any = import_module("llama_cpp.llama_cpp")
    for function, name in STRUCTURES.items():
        kind = getattr(bindings, name)
        fields = [getattr(kind, field) for field, *_ in kind._fields_]
        expected = {
            byte for field in fields for byte in range(field.offset, field.offset + field.size)
        }
        written = _written(bindings._lib[function], ctypes.sizeof(kind) + _ROOM)
        if written != expected:
            sys.exit(
                f"{LIBRARY} does not fit {BINDINGS}: {name} has fields in bytes "
                f"{sorted(written - expected)} that the bindings do not know, and none in "
                f"{sorted(expected - written)}"
            )


def _written(function: Any, size: int) -> set[int]:
    """The bytes that a function writes, whose result is returned through a hidden pointer."""
    function.argtypes, function.restype = [ctypes.c_void_p], ctypes.c_void_p
    found = set()
    for filler in (0xAA, 0x55):  # a byte with the value of the filler would not show
        memory = (ctypes.c_ubyte * size)(*[filler] * size)
        function(ctypes.addressof(memory))
        found |= {place for place, value in enumerate(memory) if value != filler}
    return found


if __name__ == "__main__":
    main()
