"""What the targets of a store cannot say: the only place that decides it."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..schema import Capture
    from .manifest import Manifest

SERVER = "server"
"""Name of the engine that lists probable tokens over the network, and gives no entropy."""


_OF_MASS = frozenset(
    {"acceptance", "teacher_loss", "teacher_calibration", "teacher_entropy", "head_mass"}
)
"""Figures that depend on how much of the probability the head holds."""


def not_given(capture: Capture) -> frozenset[str]:
    """Names of the figures that a record cannot give. Every command leaves them out."""
    return frozenset() if capture.mass else _OF_MASS


def caveats(manifest: Manifest) -> list[str]:
    """Which figures a store cannot give, one sentence each."""
    capture, imported = manifest.capture, manifest.imported
    estimated = set(() if imported is None else imported.estimated)
    if any(engine and engine.name == SERVER for engine in manifest.teacher.engines):
        estimated.add("entropy")
    said = []
    if not capture.mass:
        said.append(
            "kl is of the head alone; acceptance, and the teacher's loss, entropy and calibration, "
            "are left out: they depend on the mass outside the head, which is not known"
        )
    elif capture.tail == 0 and capture.head < manifest.tokenizer.size:
        said.append(
            "kl and acceptance are lower bounds: there are no samples of the tokens outside the "
            "head"
        )
    if capture.chunks and capture.tail:
        said.append(
            "kl is off by the same amount for every student: where several tokens of the teacher "
            "become one of the student, the entropy that is lost is estimated from the samples"
        )
    if "label" in estimated and capture.mass:
        said.append(
            "the teacher's loss is an estimate: outside the head a label has the mean probability "
            "there"
        )
    if "entropy" in estimated and capture.mass:
        said.append("the teacher's entropy is an upper bound: an even one outside the head")
    return said
