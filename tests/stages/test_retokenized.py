"""Training and evaluation on stores with a student's tokens, against plain loops in float64."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import dense
import headed
import numpy as np
import pytest
import torch
from coldstill.data.errors import ColdstillError
from coldstill.data.maintenance.retokenize import retokenize
from coldstill.data.schema import Capture
from coldstill.data.store.reader import open_store
from coldstill.stages.evaluate import evaluate_teacher, measure_quality
from coldstill.stages.models import output_head
from coldstill.stages.models.loading import load_model
from coldstill.stages.models.output_head import connect_head
from coldstill.stages.objective_config import ObjectiveConfig
from coldstill.stages.targets import losses
from coldstill.stages.targets.losses import LOSSES
from coldstill.stages.targets.tensors import TargetTensors
from coldstill.stages.training.batch import collate
from coldstill.stages.training.chunked_loss import Term, chunked_loss, row_parts
from coldstill.stages.training.feed import StoreDataset
from coldstill.stages.training.objective import supports, terms_of
from conftest import VOCABULARY, make_model
from headed import ROWS, expect_close, run, whole
from small_runs import SmallCorpus, capture_store
from spellings import byte_pairs, saved

if TYPE_CHECKING:
    from pathlib import Path

    from coldstill.data.store.reader import StoreReader

SIZES = [1, 3, 0, 0, 1, -2, 0, 5, 0, 0, 0, 0, 1, 1, 2, 0, 4, 0, 0, 0, -1, 1, 1]
CAPTURES = [Capture(head=5, tail=7), Capture(head=5, tail=0), Capture(head=0, tail=9)]
CHUNKS, KL, CE = LOSSES["chunk_likelihood"], LOSSES["kl"], LOSSES["cross_entropy"]


def draw(capture: Capture) -> tuple[torch.Tensor, TargetTensors]:
    """Hidden states and records with the chunks of `SIZES`."""
    hidden_MD, _, target = headed.draw(capture)
    assert len(SIZES) == sum(map(abs, SIZES)) == ROWS
    label = target.label_logprob * (torch.tensor(SIZES) != 0)
    sizes = torch.tensor(SIZES, dtype=torch.int32)[:, None]
    chunked = replace(capture, chunks=True)
    return hidden_MD, replace(target, label_logprob=label, chunk_sizes=sizes, capture=chunked)


def slow_chunks(logits_MV: torch.Tensor, target: TargetTensors, tau: float) -> torch.Tensor:
    """The sum over chunks, one chunk and one label at a time."""
    logprobs_MV = logits_MV.double().log_softmax(1)
    total = logits_MV.new_zeros((), dtype=torch.float64)
    for row, size in enumerate(SIZES):
        if size:
            rows = torch.arange(row, row + abs(size))
            b = -logprobs_MV[rows, target.labels[rows]].sum()
            p, q = torch.exp(target.label_logprob[row].double() / tau), torch.exp(-b / tau)
            total = total + tau * (p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log())
    return total


@pytest.mark.parametrize("rows", [1, 4, 7, ROWS])
@pytest.mark.parametrize("tau", [1.0, 10.0, 100.0])
def test_chunks_are_compared_as_a_loop_over_them_does(
    tau: float, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However the positions are divided for the computation."""
    monkeypatch.setattr(output_head, "CHUNK_ELEMENTS", rows * headed.VOCABULARY)
    hidden_MD, target = draw(CAPTURES[0])
    objective = ObjectiveConfig(kl=0.0, chunk_likelihood=0.7, tau=tau)
    terms = terms_of(objective, target.capture, "test")
    value, sums, gradients = run(hidden_MD, target, terms)
    logits_MV, leaves = whole(hidden_MD)
    expected = 0.7 * slow_chunks(logits_MV, target, tau)
    wanted = torch.autograd.grad(expected, leaves)
    assert value == pytest.approx(float(expected.detach()), rel=1e-5)
    assert sums["chunk_likelihood"] == pytest.approx(float(expected.detach()) / 0.7, rel=1e-5)
    expect_close(gradients, wanted)


def test_a_large_tau_compares_code_lengths() -> None:
    hidden_MD, target = draw(CAPTURES[0])
    logits_MV = whole(hidden_MD)[0].detach()
    found = losses.loss("chunk_likelihood", tau=1e5)(logits_MV.float(), target).sum()
    logprobs = logits_MV.log_softmax(1).gather(1, target.labels[:, None].long())[:, 0]
    limit = 0.0
    for row, size in enumerate(SIZES):
        if size:
            a = -float(target.label_logprob[row])
            b = -float(logprobs[row : row + abs(size)].sum())
            limit += b - a - a * math.log(b / a)
    assert float(found) == pytest.approx(limit, rel=1e-3)


@pytest.mark.parametrize("most", [1, 2, 5, 100])
def test_parts_of_positions_never_divide_a_chunk(most: int) -> None:
    _, target = draw(CAPTURES[0])
    parts = row_parts(target, most)
    assert [part.start for part in parts[1:]] == [part.stop for part in parts[:-1]]
    assert (parts[0].start, parts[-1].stop) == (0, ROWS)
    for part in parts:
        assert SIZES[part.start] != 0
        assert part.stop - part.start <= max(most, *SIZES)
        begins = [row for row in range(part.start, part.stop) if SIZES[row]]
        assert part.stop - part.start <= most or len(begins) == 1


@pytest.mark.parametrize("capture", CAPTURES, ids=str)
@pytest.mark.parametrize("name", [n for n, loss in LOSSES.items() if not loss.inside_chunks])
def test_losses_on_distributions_leave_out_what_is_inside_a_chunk(
    name: str, capture: Capture
) -> None:
    hidden_MD, target = draw(capture)
    loss = LOSSES[name]
    if loss.refuse(target.capture, 1.0) is not None:
        return
    known = [row for row, size in enumerate(SIZES) if size > 0]
    value, _, gradients = run(hidden_MD, target, [Term(loss, 1.0)])
    logits_MV, leaves = whole(hidden_MD)
    logprobs_MV = logits_MV.log_softmax(1)
    each = loss.value(logprobs_MV, target, 1.0)
    expected = each[known].sum()
    assert value == pytest.approx(float(expected.detach()), rel=1e-5, abs=1e-5)
    expect_close(gradients, torch.autograd.grad(expected, leaves))
    function = losses.loss(name)(logits_MV.float().detach(), dense.cast(target, torch.float32))
    inside = [row for row, size in enumerate(SIZES) if size <= 0]
    assert not function[inside].any()
    assert function[known].abs().min() > 1e-6
    assert float(each[inside].abs().detach().max()) > 1e-3


def test_cross_entropy_reads_every_label() -> None:
    hidden_MD, target = draw(CAPTURES[0])
    value, _, _ = run(hidden_MD, target, [Term(CE, 1.0)])
    logits_MV = whole(hidden_MD)[0].detach()
    assert value == pytest.approx(float(dense.cross_entropy(logits_MV, target.labels).sum()))


@pytest.mark.parametrize("capture", CAPTURES, ids=str)
def test_forward_kl_learns_at_every_position(capture: Capture) -> None:
    """Inside a chunk the record has an estimate, and without a distribution the label."""
    hidden_MD, target = draw(capture)
    value, _, gradients = run(hidden_MD, target, [Term(KL, 1.0)])
    logits_MV, leaves = whole(hidden_MD)
    each = KL.value(logits_MV.log_softmax(1), target, 1.0)
    assert value == pytest.approx(float(each.sum().detach()), rel=1e-5, abs=1e-5)
    expect_close(gradients, torch.autograd.grad(each.sum(), leaves))
    found = losses.loss("kl")(logits_MV.float().detach(), dense.cast(target, torch.float32))
    assert found == pytest.approx(each.detach().float(), rel=1e-4, abs=1e-5)


def test_labels_can_count_only_where_no_distribution_is_known() -> None:
    hidden_MD, target = draw(CAPTURES[0])
    objective = ObjectiveConfig(kl=0.0, jsd=1.0, cross_entropy=0.5, labels_inside=True)
    terms = terms_of(objective, target.capture, "test")
    value, _, gradients = run(hidden_MD, target, terms)
    logits_MV, leaves = whole(hidden_MD)
    logprobs_MV = logits_MV.log_softmax(1)
    known = torch.tensor(SIZES) > 0
    own = -logprobs_MV.gather(1, target.labels[:, None])[:, 0]
    expected = LOSSES["jsd"].value(logprobs_MV, target, 1.0)[known].sum() + 0.5 * own[~known].sum()
    assert value == pytest.approx(float(expected.detach()), rel=1e-5)
    expect_close(gradients, torch.autograd.grad(expected, leaves))
    function = losses.loss("cross_entropy", inside=1.0)
    found = function(logits_MV.detach().float(), dense.cast(target, torch.float32))
    assert not found[known].any()
    assert (found[~known] > 0).all()
    with pytest.raises(ColdstillError, match="labels_inside is for stores with a student's"):
        terms_of(objective, CAPTURES[0], "test")


def test_what_such_a_record_gives_is_said() -> None:
    chunked = [replace(capture, chunks=True) for capture in CAPTURES]
    terms = [Term(KL, 1.0), Term(LOSSES["reverse_kl"], 1.0), Term(CHUNKS, 1.0)]
    assert supports(terms, [chunked[0]], 60) == (
        "kl unbiased, reverse_kl biased, chunk_likelihood exact"
    )
    assert supports(terms[:1], [chunked[1]], 60) == "kl biased"
    assert supports(terms[:1], [CAPTURES[1]], 60) == "kl a lower bound"
    whole_head = Capture(head=60, tail=0, chunks=True)
    assert supports(terms[:2], [whole_head], 60) == "kl exact, reverse_kl exact"
    line = CHUNKS.refuse(chunked[0], 2.0)
    assert line is not None
    assert line.startswith("temperature 2.0 is not known in a student's own tokens")
    line = CHUNKS.refuse(replace(CAPTURES[0], guessed_labels=True), 1.0)
    assert line is not None
    assert line.startswith("the store was written without the log-probabilities of its labels")


@pytest.fixture(scope="module")
def heldout(
    corpus: SmallCorpus, saved_teacher: Path, tmp_path_factory: pytest.TempPathFactory
) -> StoreReader:
    """A store with documents that are cut, packed, or prompts with completions."""
    folder = tmp_path_factory.mktemp("run") / "heldout"
    capture = Capture(head=30, tail=20, tail_logprobs=True)
    return capture_store(corpus, saved_teacher, folder, capture, split="heldout")


@pytest.fixture(scope="module")
def in_bytes(heldout: StoreReader, tmp_path_factory: pytest.TempPathFactory) -> StoreReader:
    """The same in bytes."""
    root = tmp_path_factory.mktemp("bytes")
    folder = saved(root / "tokenizer", byte_pairs([], end="</s>"), end="</s>")
    retokenize(str(heldout.place), str(root / "store"), folder)
    return open_store(root / "store")


def test_the_teacher_needs_as_many_bits_for_a_text_in_other_tokens(
    heldout: StoreReader, in_bytes: StoreReader
) -> None:
    assert in_bytes.manifest.retokenized is not None
    ours, theirs = evaluate_teacher(in_bytes), evaluate_teacher(heldout)
    assert ours.positions > 2 * theirs.positions
    assert ours.bits_per_byte == pytest.approx(theirs.bits_per_byte, rel=1e-3)
    left = in_bytes.manifest.retokenized.counts["left_labels"]
    assert left < 0.03 * theirs.positions
    block = in_bytes.read(np.arange(len(in_bytes)))
    known = block.targets.chunk_sizes[:, 0] > 0
    right = block.targets.head_ids[known, 0] == _labels(block)[known]
    assert ours.accuracy == pytest.approx(float(right.mean()))


def _labels(block: Any) -> Any:
    from coldstill.data.alignment import labels

    return labels(block.sequences)


@torch.no_grad()
def test_a_student_is_measured_where_the_distribution_is_known(in_bytes: StoreReader) -> None:
    size = in_bytes.manifest.tokenizer.size
    model = make_model("llama", size, max_position_embeddings=512)
    sums, _ = measure_quality(connect_head(model, size), "positions", in_bytes)
    block = in_bytes.read(np.arange(len(in_bytes)))
    logits_MV, labels_M = dense.logits_alone(model, block.sequences, size)
    logp_MV = logits_MV.double().log_softmax(1)
    target = dense.cast(TargetTensors.from_block(block), torch.float64)
    rows = target.rows(0, len(target))
    known = torch.from_numpy(block.targets.chunk_sizes[:, 0] > 0)
    kl = KL.value(logp_MV, rows, 1.0)[known]
    means = sums.means()
    assert means["kl"] == pytest.approx(float(kl.mean()), rel=1e-4)
    top = logp_MV.argmax(1)
    assert means["agreement"] == pytest.approx(
        float((top == rows.head_ids[:, 0])[known].double().mean())
    )
    assert means["accuracy"] == pytest.approx(float((top == labels_M).double().mean()))
    assert means["loss"] == pytest.approx(float(dense.cross_entropy(logits_MV, labels_M).mean()))
    assert 0 < int(known.sum()) < len(known)


def test_permuted_ids_give_the_same_losses(
    store: StoreReader, tokenizer_folder: Path, saved_teacher: Path, tmp_path: Path
) -> None:
    """With a model whose rows are permuted in the same way, and whose gradient then is, too."""
    ids = np.random.default_rng(0).permutation(VOCABULARY)
    files = {path.name: path.read_text(encoding="utf-8") for path in tokenizer_folder.iterdir()}
    table = json.loads(files["tokenizer.json"])
    table["model"]["vocab"] = {t: int(ids[i]) for t, i in table["model"]["vocab"].items()}
    for each in table["added_tokens"]:
        each["id"] = int(ids[each["id"]])
    table["added_tokens"].sort(key=lambda each: each["id"])
    table["post_processor"] = None
    (tmp_path / "permuted").mkdir()
    for name, text in files.items():
        (tmp_path / "permuted" / name).write_text(text, encoding="utf-8")
    text = json.dumps(table)
    (tmp_path / "permuted" / "tokenizer.json").write_text(text, encoding="utf-8")
    manifest = retokenize(str(store.place), str(tmp_path / "new"), tmp_path / "permuted")
    assert not manifest.capture.chunks
    assert manifest.retokenized is None
    terms = [Term(KL, 1.0), Term(LOSSES["jsd"], 0.5), Term(CHUNKS, 0.3), Term(CE, 0.1)]
    found = []
    for source, order in ((store, None), (open_store(tmp_path / "new"), ids)):
        model = load_model(str(saved_teacher), "test", precision="fp32")
        if order is not None:
            for matrix in (model.get_input_embeddings(), model.get_output_embeddings()):
                with torch.no_grad():
                    matrix.weight[torch.from_numpy(order)] = matrix.weight[:VOCABULARY].clone()
        batch = collate([StoreDataset(source)[row] for row in range(4)])
        head = connect_head(model, VOCABULARY)
        hidden = head.hidden(batch.inputs).flatten(0, 1)[batch.positions]
        total, sums = chunked_loss(head, hidden, batch.targets, terms)
        torch.autograd.backward(total)
        gradient = model.get_output_embeddings().weight.grad[:VOCABULARY]
        found.append((sums, gradient if order is None else gradient[torch.from_numpy(order)]))
    for name, value in found[0][0].items():
        assert float(found[1][0][name]) == pytest.approx(float(value), rel=1e-5, abs=1e-6), name
    torch.testing.assert_close(found[1][1], found[0][1], rtol=1e-4, atol=1e-5)
