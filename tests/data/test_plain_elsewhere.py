"""Other tools, without coldstill, read what is written with the `plain` codec.

Each reads in a process of its own, so that nothing of this project can help it.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import coldstill.data
import numpy as np
import pytest
from coldstill.data.formats import STORES
from coldstill.data.schema import Targets
from oracles import manifest_for, random_block, write_missing

pytestmark = pytest.mark.slow

BLOCK = random_block(0, 10)
SOME = ("token_ids", "head_ids", "head_logprobs")

ARROW_READERS = {
    "pyarrow": """
import pyarrow
tables = [pyarrow.ipc.open_file(file).read_all() for file in files]
rows = pyarrow.concat_tables(tables).to_pylist()
""",
    "polars": """
import polars
table = polars.concat([polars.read_ipc(file) for file in files])
rows = table.select("token_ids", "head_ids", "head_logprobs").to_dicts()
""",
    "pandas": """
import numpy, pandas
frame = pandas.concat([pandas.read_feather(file) for file in files])
def plain(value):
    return [plain(v) for v in value] if isinstance(value, numpy.ndarray) else value.item()
frame = frame[["token_ids", "head_ids", "head_logprobs"]].map(plain)
rows = frame.to_dict("records")
""",
}
"""How each tool makes `rows`, a dictionary a sequence, of the shards in `files`."""

ZARR_READERS = {
    "zarr": """
import zarr
def opened(file):
    group = zarr.open(file, mode="r")
    return lambda name: group[name][...], lambda name: group[name].attrs["offsets"]
""",
    "tensorstore": """
import tensorstore
def opened(file):
    def read(name):
        spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": f"{file}/{name}"}}
        return tensorstore.open(spec).result().read().result()
    def offsets(name):
        with open(f"{file}/{name}/zarr.json") as described:
            return json.load(described)["attributes"]["offsets"]
    return read, offsets
""",
}
"""How each tool gives the arrays of a shard by name, and the name of a list's offsets."""

ZARR_ROWS = """
rows = []
for file in files:
    array, offsets = opened(file)
    columns = {}
    for name in ("token_ids", "head_ids", "head_logprobs"):
        values, borders = array(name), array(offsets(name))
        lists = [values[a:b].tolist() for a, b in zip(borders[:-1], borders[1:])]
        columns[name] = lists
    rows += [dict(zip(columns, row)) for row in zip(*columns.values())]
"""


def expected(*names: str) -> list[dict[str, Any]]:
    """The block, one dictionary a sequence, with all columns or these."""
    sequences, targets = BLOCK.sequences, BLOCK.targets
    borders = sequences.positions.offsets
    columns: dict[str, Any] = {
        "sequence_id": sequences.ids.tolist(),
        "sequence_hash": sequences.hashes.tolist(),
        "token_ids": [row.tolist() for row in sequences.tokens],
        "document_starts": [row.tolist() for row in sequences.document_starts],
        "document_ids": [row.tolist() for row in sequences.document_ids],
        "positions": [row.tolist() for row in sequences.positions],
    } | {
        f.name: [part.tolist() for part in np.split(getattr(targets, f.name), borders[1:-1])]
        for f in fields(Targets)
        if f.name not in ("tail", "chunk_sizes")  # which a store in the teacher's tokens lacks
    }
    tail = targets.tail
    assert tail.logprobs is not None
    columns["tail_sizes"] = [part.tolist() for part in np.split(tail.lengths, borders[1:-1])]
    inside = tail.offsets[borders[1:-1]]
    for name, values in (("ids", tail.ids), ("counts", tail.counts), ("logprobs", tail.logprobs)):
        columns[f"tail_{name}"] = [part.tolist() for part in np.split(values, inside)]
    chosen = {name: columns[name] for name in names or columns}
    return [dict(zip(chosen, row, strict=True)) for row in zip(*chosen.values(), strict=True)]


def read_elsewhere(code: str, tmp_path: Path, store: str) -> Any:
    """What another process makes of a store's shards; it has nothing of coldstill."""
    manifest = manifest_for(BLOCK, codec="plain", store=store)
    write_missing(tmp_path / "logits", manifest, BLOCK)
    suffix = STORES[store].suffix
    shards = sorted(str(shard) for shard in (tmp_path / "logits" / "shards").glob(f"*{suffix}"))
    assert len(shards) == 3
    script = (
        f"import json, sys\nfiles = sys.argv[1:]\n{code}\n"
        "assert not any(name.split('.')[0] == 'coldstill' for name in sys.modules)\n"
        "print(json.dumps(rows))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, *shards],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")},
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("tool", list(ARROW_READERS))
def test_the_arrow_store_is_read_by(tool: str, tmp_path: Path) -> None:
    pytest.importorskip(tool)
    columns = () if tool == "pyarrow" else SOME
    assert read_elsewhere(ARROW_READERS[tool], tmp_path, "arrow") == expected(*columns)


DOCUMENTED = re.findall(
    r"^```python\n(.*?)^```$",
    (Path(coldstill.data.__file__).parent / "FORMAT.md").read_text(encoding="utf-8"),
    re.DOTALL | re.MULTILINE,
)
"""The lines that the description of the format gives, block by block."""


DOCUMENTED_ROWS = {
    "duckdb": """
found = duckdb.sql("SELECT token_ids, head_ids, head_logprobs FROM shards ORDER BY sequence_id")
rows = [dict(zip(found.columns, row)) for row in found.fetchall()]
""",
    "datasets": """
rows = rows.select_columns(["token_ids", "head_ids", "head_logprobs"]).to_list()
""",
}
"""How `rows` follow from what the documented lines of a tool leave."""


@pytest.mark.parametrize("tool", list(DOCUMENTED_ROWS))
def test_the_documented_lines_read_an_arrow_store(tool: str, tmp_path: Path) -> None:
    pytest.importorskip(tool)
    (lines,) = (block for block in DOCUMENTED if f"import {tool}" in block)
    assert read_elsewhere(lines + DOCUMENTED_ROWS[tool], tmp_path, "arrow") == expected(*SOME)


@pytest.mark.parametrize("tool", list(ZARR_READERS))
def test_the_zarr_store_is_read_by(tool: str, tmp_path: Path) -> None:
    pytest.importorskip(tool)
    assert read_elsewhere(ZARR_READERS[tool] + ZARR_ROWS, tmp_path, "zarr") == expected(*SOME)
