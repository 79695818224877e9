"""A store holds the teacher's distributions for each document alone; batches fit into memory."""

from __future__ import annotations

import contextlib
import copy
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import coldstill.stages.capture.shards as capture_shards_module
import numpy as np
import pytest
import torch
from coldstill.data.errors import ColdstillError
from coldstill.data.order import uniform
from coldstill.data.schema import Block, Capture
from coldstill.data.store.reader import open_store
from coldstill.stages.capture.batches import batches_of, consecutive_batches
from coldstill.stages.capture.plan import chosen_rows, make_manifest
from coldstill.stages.capture.shards import ShardQueue, Tally
from coldstill.stages.models.device import is_out_of_memory
from coldstill.stages.models.loading import load_model, load_tokenizer
from coldstill.stages.teacher_logits import capture_split, is_captured
from conftest import FAMILIES, VOCABULARY, make_model
from dense import documents, logits_alone, record
from oracles import draws
from small_runs import LENGTH, SmallCorpus, capture_store, load_teacher, plan_capture, save_teacher
from tokenizers import AddedToken

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from coldstill.data.store.reader import StoreReader
    from coldstill.stages.report import Report


CAPTURE = Capture(head=6, tail=5, temperatures=(2.0,), seed=3)


@pytest.fixture(scope="module")
def store(
    corpus: SmallCorpus, saved_teacher: Path, tmp_path_factory: pytest.TempPathFactory
) -> StoreReader:
    return capture_store(corpus, saved_teacher, tmp_path_factory.mktemp("run") / "logits", CAPTURE)


def everything(store: StoreReader) -> Block:
    return store.read(np.arange(len(store)))


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a store except its measurements."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "measurements.json"
    }


def test_the_store_has_all_cases_of_alignment_and_no_position_across_documents(
    corpus: SmallCorpus, store: StoreReader
) -> None:
    sequences = everything(store).sequences
    assert corpus.record.counts["cut_documents"] > 0
    assert store.manifest.shards > 2
    assert len(sequences) % store.manifest.shard_sequences  # the last shard is not full
    lengths = [end - start for _, start, end in documents(sequences)]
    assert len(set(lengths)) > 5
    assert len(lengths) > len(sequences)  # several documents in a sequence
    assert sequences.tokens.lengths.min() < LENGTH  # padding
    supervised = len(sequences.positions.values)
    assert supervised < sum(lengths) - len(lengths)  # prompts are not supervised
    for row, _, end in documents(sequences):
        assert end - 1 not in sequences.positions[row]
    targets = everything(store).targets
    assert max(targets.head_ids.max(), targets.tail.ids.max()) < VOCABULARY


@pytest.mark.parametrize("family", FAMILIES)
def test_targets_equal_those_of_each_document_alone(
    family: str, corpus: SmallCorpus, tokenizer: Any, tmp_path: Path
) -> None:
    teacher = save_teacher(tmp_path / "teacher", tokenizer, family)
    store = capture_store(corpus, teacher, tmp_path / "logits", CAPTURE)
    block = everything(store)
    model = load_model(str(teacher), "teacher", precision="fp32")
    with torch.no_grad():
        logits_MV, labels_M = logits_alone(model, block.sequences, VOCABULARY)
        whole, _ = logits_alone(model, block.sequences, VOCABULARY + 16)
    assert (whole.argmax(1) >= VOCABULARY).any()
    ids_M = np.repeat(block.sequences.ids, block.sequences.positions.lengths)
    shifts = torch.from_numpy(uniform(3, ids_M, block.sequences.positions.values))
    ours, dense = block.targets, record(logits_MV, labels_M, shifts, CAPTURE)
    scale = float(logits_MV.abs().max())
    names = ("label_logprob", "entropy", "log_tail", "head_logprobs", "log_norm")
    expected = {name: getattr(dense, name, None) for name in names}
    expected["label_logprob"] = logits_MV.double().log_softmax(1).gather(1, labels_M[:, None])[:, 0]
    for name in names:
        ours_of = torch.from_numpy(getattr(ours, name).copy()).double()
        torch.testing.assert_close(ours_of, expected[name], atol=2e-5 * scale, rtol=1e-4, msg=name)
    assert (ours.head_ids == dense.head_ids.numpy()).mean() > 0.999
    assert (draws(ours.tail) == draws(dense.tail.to_tail(CAPTURE.tail))).mean() > 0.995
    # targets shifted by one position differ
    label_logprob = ours.label_logprob
    assert np.abs(label_logprob[1:] - label_logprob[:-1]).mean() > 0.1


def test_a_killed_capture_continues_to_the_same_bytes(
    corpus: SmallCorpus, saved_teacher: Path, store: StoreReader, tmp_path: Path
) -> None:
    plan = plan_capture(corpus, saved_teacher, tmp_path / "logits", CAPTURE)
    teacher = load_teacher(saved_teacher)
    per_shard = store.manifest.shard_sequences * LENGTH

    def killed(report: Report) -> None:
        if report.done > per_shard:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        capture_split(plan, teacher, killed)
    assert len(list((tmp_path / "logits/shards").glob("*.json"))) == 1
    assert not is_captured(plan)
    with pytest.raises(ColdstillError, match=f"incomplete, 1 of {store.manifest.shards} shards"):
        open_store(tmp_path / "logits")
    notes: list[str] = []
    capture_split(plan, teacher, lambda report: notes.append(report.note))
    assert notes[0] == f"continuing: 1 of {store.manifest.shards} shards done"
    assert contents(tmp_path / "logits") == contents(Path(str(store.place)))


def test_a_complete_store_is_not_written_again(
    corpus: SmallCorpus, saved_teacher: Path, store: StoreReader
) -> None:
    plan = plan_capture(corpus, saved_teacher, Path(str(store.place)), CAPTURE)
    assert is_captured(plan)
    before = {path: path.stat().st_mtime_ns for path in Path(str(store.place)).rglob("*.*")}
    capture_split(plan, load_teacher(saved_teacher))
    assert {path: path.stat().st_mtime_ns for path in Path(str(store.place)).rglob("*.*")} == before


def test_another_teacher_or_capture_is_refused(
    corpus: SmallCorpus, saved_teacher: Path, store: StoreReader, tokenizer: Any, tmp_path: Path
) -> None:
    make_model("llama", VOCABULARY + 16, seed=9).save_pretrained(tmp_path / "other")
    tokenizer.save_pretrained(tmp_path / "other")
    folder = Path(str(store.place))
    plan = plan_capture(corpus, tmp_path / "other", folder, CAPTURE)
    with pytest.raises(ColdstillError, match=r"made differently: teacher\.fingerprint: ") as error:
        is_captured(plan)
    assert "\n" not in str(error.value)
    with pytest.raises(ColdstillError, match=r"teacher\.fingerprint"):
        capture_split(plan, load_teacher(tmp_path / "other"))
    plan = plan_capture(corpus, saved_teacher, folder, Capture(head=7, tail=5))
    with pytest.raises(ColdstillError, match=r"capture\.head: 6 in the store, 7 now"):
        is_captured(plan)


def test_nan_logits_are_refused_with_sequence_and_position(
    corpus: SmallCorpus, saved_teacher: Path, tmp_path: Path
) -> None:
    teacher = load_teacher(saved_teacher)
    plan = plan_capture(corpus, saved_teacher, tmp_path / "logits", CAPTURE)
    sequences = plan.sequences.read(np.arange(8))
    row, position = 4, int(sequences.positions[4][5])
    spoiled = int(sequences.tokens[row][position])
    spoiled_positions = [
        (int(sequences.ids[r]), p)
        for r in range(8)
        for p in sequences.positions[r].tolist()
        if sequences.tokens[r][p] == spoiled
    ]

    def spoil(module: Any, inputs: Any, output: Any) -> Any:
        output.last_hidden_state[teacher_inputs[0] == spoiled] = torch.nan
        return output

    teacher_inputs: list[torch.Tensor] = []
    model = teacher.head.model.base_model
    model.register_forward_pre_hook(
        lambda module, arguments, inputs: teacher_inputs.insert(0, inputs["input_ids"]),
        with_kwargs=True,
    )
    model.register_forward_hook(spoil)
    with pytest.raises(ColdstillError) as error:
        capture_split(plan, teacher)
    sequence, position = spoiled_positions[0]
    first = f"not finite at train sequence {sequence}, position {position}, so no target of"
    assert first in str(error.value)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "logits").exists()  # not even started


def test_an_impossible_capture_is_refused_before_anything_is_written(
    corpus: SmallCorpus, saved_teacher: Path, tmp_path: Path
) -> None:
    def refused(capture: Capture, **changes: Any) -> str:
        plan = plan_capture(corpus, saved_teacher, tmp_path / "logits", capture, **changes)
        with pytest.raises(ColdstillError) as error:
            is_captured(plan)
        with pytest.raises(ColdstillError):
            make_manifest(plan, "positions")
        assert "\n" not in str(error.value)
        return str(error.value)

    whole = refused(Capture(head=VOCABULARY + 1, tail=0))
    assert whole == f"logits.head: {VOCABULARY + 1} is more than the vocabulary's 320 tokens"
    assert refused(Capture(head=VOCABULARY, tail=1)).startswith("logits.tail: a head of 320 is")
    long = refused(CAPTURE, sequence_length=129)
    assert long.startswith("corpus.sequence_length: 129 is more than the teacher's context of 128")
    many = refused(CAPTURE, rows=range(2_000_000), shard_tokens=LENGTH)
    assert many == (
        f"logits.shard_tokens: {LENGTH} make 2,000,000 shards of 2,000,000 sequences, a store may "
        f"have 1,048,576; set it to at least {2 * LENGTH}"
    )
    assert not (tmp_path / "logits").exists()


@pytest.mark.slow
def test_an_unknown_separator_causes_a_warning_and_a_likelier_token_is_proposed(
    corpus: SmallCorpus, tokenizer: Any, tmp_path: Path
) -> None:
    own, separator = copy.deepcopy(tokenizer), tokenizer.eos_token_id
    name = min(text for text in own.get_vocab() if len(text) == 4 and text.isascii())
    other = own.convert_tokens_to_ids(name)
    own.add_tokens([AddedToken(name, special=True, normalized=False)], special_tokens=True)
    own.save_pretrained(tmp_path / "teacher")
    make_model("llama", VOCABULARY, seed=1).save_pretrained(tmp_path / "teacher")
    proposal = f'set corpus.separator = "{name}" in the recipe'
    for number, (used, unused, warned, text) in enumerate(
        (
            (1.0, -60.0, False, ""),
            (3.0, 3.1, False, ""),
            (3.0, 5.0, True, proposal),
            (-60.0, -60.0, True, "it was not trained with this separator"),
            (-60.0, 5.0, True, proposal),
        )
    ):
        teacher = load_teacher(tmp_path / "teacher")
        head = torch.nn.Linear(32, VOCABULARY)
        with torch.no_grad():
            head.weight.mul_(0.01)
            head.bias.zero_()
            head.bias[separator], head.bias[other] = used, unused
        teacher.head.model.lm_head = head
        reports: list[Report] = []
        folder = tmp_path / str(number)
        plan = plan_capture(corpus, tmp_path / "teacher", folder, CAPTURE, split="heldout")
        capture_split(plan, teacher, reports.append)
        (note,) = [report for report in reports if "mean probability" in report.note]
        assert "<|endoftext|>" in note.note
        assert note.warning == warned
        assert text in note.note
        assert ("set corpus.separator = " in note.note) == (text == proposal)


@pytest.mark.slow
@pytest.mark.parametrize("batch", [1, 5, 100])
def test_the_batch_size_does_not_change_the_targets(
    batch: int, corpus: SmallCorpus, saved_teacher: Path, store: StoreReader, tmp_path: Path
) -> None:
    other = capture_store(
        corpus, saved_teacher, tmp_path / "logits", CAPTURE, batch_tokens=batch * LENGTH
    )
    ours, theirs = everything(store).targets, everything(other).targets
    assert (ours.head_ids == theirs.head_ids).mean() > 0.999
    assert (draws(ours.tail) == draws(theirs.tail)).mean() > 0.999
    for name in ("log_tail", "entropy", "label_logprob", "log_norm", "head_logprobs"):
        np.testing.assert_allclose(getattr(ours, name), getattr(theirs, name), rtol=1e-4, atol=1e-4)


def test_a_sample_of_sequences_has_the_same_targets(
    corpus: SmallCorpus, saved_teacher: Path, store: StoreReader, tmp_path: Path
) -> None:
    rows = np.asarray(chosen_rows(len(store), 7, seed=1))
    assert len(rows) == 7
    assert (np.diff(rows) > 0).all()
    some = everything(capture_store(corpus, saved_teacher, tmp_path / "logits", CAPTURE, rows=rows))
    same = everything(store).take(rows)
    np.testing.assert_array_equal(some.sequences.ids, rows)
    np.testing.assert_array_equal(draws(some.targets.tail), draws(same.targets.tail))
    np.testing.assert_allclose(
        some.targets.head_logprobs, same.targets.head_logprobs, rtol=1e-4, atol=1e-4
    )


def test_a_store_has_its_tokenizer_and_measurements(store: StoreReader) -> None:
    assert load_tokenizer(str(store.tokenizer_folder()), "store").get_vocab()["<|endoftext|>"] == 0
    text = store.place.read("measurements.json").decode()
    assert '"capture_tokens_per_second"' in text


def small_memory(model: Any, tokens: int, error: Callable[[], BaseException]) -> list[int]:
    """Make the model fail above a number of tokens; returns the sizes of all batches."""
    asked: list[int] = []

    def hook(module: Any, arguments: Any, inputs: dict[str, Any]) -> None:
        asked.append(inputs["input_ids"].numel())
        if asked[-1] > tokens:
            raise error()

    model.base_model.register_forward_pre_hook(hook, with_kwargs=True)
    return asked


@pytest.mark.slow
@pytest.mark.parametrize(
    "error",
    [
        lambda: torch.OutOfMemoryError("CUDA out of memory."),
        lambda: RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you"),
        MemoryError,
    ],
)
def test_a_batch_that_does_not_fit_is_halved_without_loss(
    error: Any, corpus: SmallCorpus, saved_teacher: Path, store: StoreReader, tmp_path: Path
) -> None:
    teacher = load_teacher(saved_teacher)
    asked = small_memory(teacher.head.model, 3 * LENGTH, error)
    reports: list[Report] = []
    plan = plan_capture(
        corpus, saved_teacher, tmp_path / "logits", CAPTURE, batch_tokens=10 * LENGTH
    )
    capture_split(plan, teacher, reports.append)
    warnings = [report.note for report in reports if report.warning]
    assert len(warnings) == 1  # 5 sequences in a shard: 240 tokens, then 120
    assert warnings[0] == (
        f"out of memory with a batch of {5 * LENGTH:,} tokens; continuing with "
        f"{5 * LENGTH // 2:,}, set logits.batch_tokens to start there"
    )
    # the first batch, its half, another large batch, and the one that was prepared ahead
    assert sum(tokens > 3 * LENGTH for tokens in asked) <= 4
    ours, theirs = everything(open_store(tmp_path / "logits")), everything(store)
    np.testing.assert_array_equal(ours.sequences.hashes, theirs.sequences.hashes)
    assert (ours.targets.head_ids == theirs.targets.head_ids).mean() > 0.999
    np.testing.assert_allclose(
        ours.targets.label_logprob, theirs.targets.label_logprob, rtol=1e-4, atol=1e-4
    )


def test_a_single_sequence_that_does_not_fit_is_refused_with_advice(
    corpus: SmallCorpus, saved_teacher: Path, tmp_path: Path
) -> None:
    teacher = load_teacher(saved_teacher)
    small_memory(teacher.head.model, 1, lambda: torch.OutOfMemoryError("CUDA out of memory."))
    plan = plan_capture(corpus, saved_teacher, tmp_path / "logits", CAPTURE)
    with pytest.raises(ColdstillError, match=r"not enough memory for one sequence of \d+ tokens"):
        capture_split(plan, teacher)
    assert not (tmp_path / "logits").exists()


def test_other_errors_do_not_count_as_out_of_memory() -> None:
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert not is_out_of_memory(ValueError("out of memory"))


@pytest.mark.parametrize("budget", [1, 64, 500, 10_000])
def test_every_sequence_comes_once_and_within_the_budget(budget: int) -> None:
    lengths = np.random.default_rng(0).integers(2, 129, 300)
    batches = list(batches_of(lengths, budget))
    assert sorted(np.concatenate(batches).tolist()) == list(range(300))
    for batch in batches:
        assert len(batch) == 1 or len(batch) * lengths[batch].max() <= budget
        assert (np.diff(batch) > 0).all()


def test_documents_of_many_lengths_need_little_padding() -> None:
    lengths = np.random.default_rng(1).integers(16, 1025, 4000)
    cost = sum(len(b) * int(lengths[b].max()) for b in batches_of(lengths, 8192))
    assert cost < 1.09 * lengths.sum()
    in_order = [lengths[i : i + 8] for i in range(0, 4000, 8)]
    assert sum(len(b) * int(b.max()) for b in in_order) > 1.5 * lengths.sum()


def test_packed_sequences_keep_their_order() -> None:
    lengths = np.random.default_rng(2).integers(240, 257, 100)
    lengths[0] = 256
    batches = list(batches_of(lengths, 2048))
    assert np.concatenate(batches).tolist() == list(range(100))
    assert [len(batch) for batch in batches] == [8] * 12 + [4]


def test_a_sequence_longer_than_the_budget_has_its_own_batch() -> None:
    assert [b.tolist() for b in batches_of(np.array([100, 99]), 50)] == [[0], [1]]
    assert list(batches_of(np.zeros(0, np.int64), 50)) == []


class _Shelf:
    """A store in memory that several processes fill."""

    def __init__(self, shards: int) -> None:
        self.shards, self.claims, self.listings = shards, 0, 0
        self.done: set[int] = set()
        self.held: set[int] = set()
        self.manifest = SimpleNamespace(shard_rows=lambda shard: range(shard, shard + 1))

    def missing(self) -> list[int]:
        self.listings += 1
        return [shard for shard in range(self.shards) if shard not in self.done]

    @contextlib.contextmanager
    def claim(self, shard: int) -> Iterator[bool]:
        self.claims += 1
        if shard in self.held:
            yield False
            return
        self.held.add(shard)
        yield shard not in self.done
        self.held.remove(shard)


def test_shards_that_others_have_finished_are_listed_and_not_claimed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A claim in a bucket takes several requests, and each process meets every shard."""
    shards, processes = 400, 8
    shelf, plan = _Shelf(shards), SimpleNamespace(rows=range(shards), sequence_length=1)
    monkeypatch.setattr(capture_shards_module, "world_size", lambda: processes)
    tallies = [Tally() for _ in range(processes)]
    queues = [
        ShardQueue(plan, shelf, None, tally, padded=False, source=None)  # type: ignore[arg-type]
        for tally in tallies
    ]
    claims = [queue._claims() for queue in queues]
    captured = [0] * processes
    working = list(range(processes))
    while working:
        for rank in list(working):
            monkeypatch.setattr(capture_shards_module, "rank", lambda own=rank: own)
            if not captured[rank]:
                tallies[rank].total = shards - len(shelf.done)
            # the first process takes two shards while each other one takes one
            for _ in range(2 if rank == 0 else 1):
                given = next(claims[rank], None)
                if given is None:
                    working.remove(rank)
                    break
                shard, held = given
                shelf.done.add(shard)
                held.close()
                captured[rank] += 1
    assert shelf.done == set(range(shards))
    assert not shelf.held
    assert sum(captured) == shards
    assert captured[0] > shards // processes  # the faster process helped the others
    assert [tally.total for tally in tallies] == captured
    assert shelf.claims < shards + 4 * processes
    assert shelf.listings < 16 * processes


def test_prompts_of_all_lengths_share_a_batch() -> None:
    lengths = np.array([10, 40, 12, 11, 90, 10, 10, 10, 10])
    batches = [batch.tolist() for batch in consecutive_batches(lengths, 120)]
    assert batches == [[0, 1, 2], [3], [4], [5, 6, 7, 8]]
    assert [len(b) for b in consecutive_batches(np.array([100, 99]), 50)] == [1, 1]
    assert list(consecutive_batches(np.zeros(0, np.int64), 50)) == []
