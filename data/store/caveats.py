"""What the targets of a store cannot say."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .manifest import Manifest

SERVER = "server"
"""Name of the engine that lists probable tokens over the network, and gives no entropy."""


def caveats(manifest: Manifest) -> list[str]:
    """Which figures a store cannot give, one sentence each."""
    capture, imported = manifest.capture, manifest.imported
    estimated = set(() if imported is None else imported.estimated)
    if any(engine and engine.name == SERVER for engine in manifest.teacher.engines):
        estimated.add("entropy")
    said = []
    if not capture.mass:
        said.append(
            "kl, the teacher's loss and its entropy are of the head alone; acceptance cannot be "
            "given"
        )
    elif capture.tail == 0 and capture.head < manifest.tokenizer.size:
        said.append(
            "kl and acceptance are lower bounds: there are no samples of the tokens outside the "
            "head"
        )
    if "label" in estimated:
        said.append(
            "the teacher's loss is an estimate: outside the head a label has the mean probability "
            "there"
        )
    if "entropy" in estimated and capture.mass:
        said.append("the teacher's entropy is an upper bound: an even one outside the head")
    return said
