"""An independent judge of exported students: loss and KL by llama.cpp beside `coldstill evaluate`.

For each GGUF export of a run, llama.cpp computes the student's full distribution at every held-out
position, and transformers the teacher's, one sequence at a time and in float64. Nothing of
coldstill but the tokens and supervised positions of the held-out store is used, not even its rule
that a position predicts the next token. `evaluate` has its figures from that store's record and the
student before the export.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import numpy as np
import torch
from coldstill.data.store.reader import open_store
from measure import write_rows
from real_teacher import teacher_weights
from transformers import AutoModelForCausalLM

if TYPE_CHECKING:
    from collections.abc import Iterator

    from coldstill.data.schema import Sequences
    from coldstill.data.store.reader import StoreReader


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One export, in nats; `evaluated_...` are the student's own figures."""

    student: str
    format: str
    positions: int
    loss: float
    evaluated_loss: float
    kl: float
    evaluated_kl: float
    agreement: float
    evaluated_agreement: float


@click.command(help=__doc__)
@click.argument("run", type=click.Path(path_type=Path))
def main(run: Path) -> None:
    """Judge every GGUF export of a run."""
    store = open_store(run / "heldout")
    teacher: Any = AutoModelForCausalLM.from_pretrained(
        teacher_weights().name, dtype=torch.float32
    ).eval()
    rows = [
        _judged(path, store, teacher)
        for path in sorted(run.glob("students/*/exports/gguf-*/*.gguf"))
    ]
    write_rows("judge", rows)
    print("| export | positions | loss | evaluate | KL | evaluate | top-1 | evaluate |")
    print("|---|---:|---:|---:|---:|---:|---:|---:|")
    for row in rows:
        print(
            f"| {row.student} ({row.format}) | {row.positions:,} | {row.loss:.4f} | "
            f"{row.evaluated_loss:.4f} | {row.kl:.4f} | {row.evaluated_kl:.4f} | "
            f"{row.agreement:.1%} | {row.evaluated_agreement:.1%} |"
        )


@torch.no_grad()
def _judged(path: Path, store: StoreReader, teacher: Any) -> Row:
    import llama_cpp

    student = llama_cpp.Llama(
        str(path), n_ctx=store.manifest.packing.sequence_length, logits_all=True, verbose=False
    )
    loss = kl = agreement = 0.0
    positions = 0
    for tokens, places in _documents(store):
        student.reset()
        student.eval(tokens.tolist())
        ours_TV = torch.from_numpy(np.array(student.scores[: len(tokens)])).double()
        theirs_TV = teacher(torch.from_numpy(tokens)[None].long()).logits[0].double()
        ours, theirs = ours_TV.log_softmax(1)[places], theirs_TV.log_softmax(1)[places]
        labels = torch.from_numpy(tokens).long()[places + 1]
        loss -= float(ours.gather(1, labels[:, None]).sum())
        kl += float((theirs.exp() * (theirs - ours)).sum())
        agreement += float((ours.argmax(1) == theirs.argmax(1)).sum())
        positions += len(places)
    folder = path.parents[2]
    evaluated = json.loads((folder / "evaluation.json").read_text())
    return Row(
        student=folder.name,
        format=path.parent.name,
        positions=positions,
        loss=loss / positions,
        evaluated_loss=evaluated["loss"],
        kl=kl / positions,
        evaluated_kl=evaluated["kl"],
        agreement=agreement / positions,
        evaluated_agreement=evaluated["agreement"],
    )


def _documents(store: StoreReader) -> Iterator[tuple[Any, Any]]:
    """Tokens of each document, and its positions with a supervised next token."""
    for row in range(len(store)):
        sequences: Sequences = store.read(np.array([row])).sequences
        tokens_T, starts_D = sequences.tokens[0], sequences.document_starts[0].tolist()
        supervised = sequences.positions[0]
        for start, end in zip(starts_D, [*starts_D[1:], len(tokens_T)], strict=True):
            inside = supervised[(supervised >= start) & (supervised < end)] - start
            if len(inside):
                yield tokens_T[start:end], torch.from_numpy(inside.astype(np.int64))


if __name__ == "__main__":
    main()
