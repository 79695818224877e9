"""Captures through a server that lists the most probable tokens."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from coldstill.data.errors import ColdstillError, StoppedError
from coldstill.data.places.faults import Patience
from coldstill.data.schema import Capture
from coldstill.data.store.reader import open_store
from coldstill.stages.capture import served as served_module
from coldstill.stages.capture.served import ServedTeacher, connect, served_identity
from coldstill.stages.config import GenerateConfig, ServerOptions
from coldstill.stages.models.engines import http_client
from coldstill.stages.models.loading import described_model, load_tokenizer
from coldstill.stages.models.vocabulary import vocabulary_size
from coldstill.stages.report import Report, silent
from coldstill.stages.teacher_logits import capture_split, is_captured
from served import Served, serving
from small_runs import LENGTH, SmallCorpus, capture_store, plan_capture

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from coldstill.stages.capture.plan import CapturePlan
    from coldstill.stages.report import Reporter

CAPTURE = Capture(head=6, tail=0)


@pytest.fixture
def served(saved_teacher: Path) -> Iterator[Served]:
    with serving(Served(saved_teacher)) as server:
        yield server


@pytest.fixture(autouse=True)
def _short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_client, "PATIENCE", Patience(tries=4, delay=0.01, longest=0.02))


def _connected(
    served: Served, folder: Path, report: Reporter = silent, **options: Any
) -> contextlib.closing[ServedTeacher]:
    tokenizer = load_tokenizer(str(folder), "teacher.model")
    return contextlib.closing(
        connect(
            described_model(str(folder), "teacher.model", own_code=False),
            tokenizer,
            url=served.url,
            options=ServerOptions(**options),
            vocabulary=vocabulary_size(tokenizer),
            sequence_length=LENGTH,
            stage="test",
            report=report,
        )
    )


def _plan(
    corpus: SmallCorpus, folder: Path, teacher: ServedTeacher, store: Path, **changes: Any
) -> CapturePlan:
    model = described_model(str(folder), "teacher.model", own_code=False)
    identity = served_identity(str(folder), model, teacher.server.served)
    plan = plan_capture(corpus, folder, store, CAPTURE, **changes)
    return dataclasses.replace(plan, teacher=identity)


def test_the_record_is_the_head_of_the_model(
    corpus: SmallCorpus, saved_teacher: Path, served: Served, tmp_path: Path
) -> None:
    own = capture_store(corpus, saved_teacher, tmp_path / "own", CAPTURE)
    with _connected(served, saved_teacher) as teacher:
        plan = _plan(corpus, saved_teacher, teacher, tmp_path / "served")
        capture_split(plan, teacher)
        assert is_captured(plan)
    store = open_store(tmp_path / "served")
    ours, theirs = (each.read(np.arange(len(each))) for each in (own, store))
    for name in ("tokens", "document_starts", "positions"):
        a, b = getattr(ours.sequences, name), getattr(theirs.sequences, name)
        assert np.array_equal(a.values, b.values)
    mine, other = ours.targets, theirs.targets
    same = mine.head_ids == other.head_ids
    assert same.mean() > 0.99  # others are equally probable
    np.testing.assert_allclose(mine.head_logprobs, other.head_logprobs, atol=2e-4)
    np.testing.assert_allclose(mine.label_logprob, other.label_logprob, atol=2e-4)
    np.testing.assert_allclose(np.exp(mine.log_tail), np.exp(other.log_tail), atol=2e-5)
    assert (other.entropy >= mine.entropy - 1e-3).all()  # the rest is taken to be even
    found = store.manifest.teacher
    assert found.engine is not None
    assert found.engine.options == {"model": "served"}
    assert (found.engine.name, found.engine.version) == ("server", "vllm 1.2.3")
    assert found.parameters == own.manifest.teacher.parameters


def test_as_many_requests_run_together_as_are_allowed(
    corpus: SmallCorpus, saved_teacher: Path, served: Served, tmp_path: Path
) -> None:
    with _connected(served, saved_teacher, requests=3) as teacher:
        capture_split(_plan(corpus, saved_teacher, teacher, tmp_path / "store"), teacher)
    assert 1 < served.most_together <= 3


def test_failures_that_pass_are_tried_again_and_said_once(
    corpus: SmallCorpus, saved_teacher: Path, served: Served, tmp_path: Path
) -> None:
    reports: list[Report] = []
    with _connected(served, saved_teacher, reports.append, requests=1) as teacher:
        served.failures = [503, 429, 0]
        capture_split(_plan(corpus, saved_teacher, teacher, tmp_path / "store"), teacher)
    padding, first, count = [str(each.note) for each in reports if each.warning]
    assert "16 rows beyond the tokens of its tokenizer" in padding
    assert "refused (503): it failed; trying again" in first
    assert "3 requests were sent again" in count


def test_a_capture_continues_after_a_server_that_failed(
    corpus: SmallCorpus, saved_teacher: Path, served: Served, tmp_path: Path
) -> None:
    whole, again = tmp_path / "whole", tmp_path / "again"
    with _connected(served, saved_teacher, requests=1) as teacher:
        capture_split(_plan(corpus, saved_teacher, teacher, whole), teacher)
        plan = _plan(corpus, saved_teacher, teacher, again)
        served.failures = [503] * 4
        with pytest.raises(ColdstillError, match="still failing after 4 tries"):
            capture_split(plan, teacher)
    with _connected(served, saved_teacher) as teacher:
        capture_split(plan, teacher)
    first, second = open_store(whole), open_store(again)
    for shard in range(first.manifest.shards):
        assert first.commit(shard).files == second.commit(shard).files


def test_another_model_does_not_continue_a_store(
    corpus: SmallCorpus, saved_teacher: Path, served: Served, tmp_path: Path
) -> None:
    calls: list[None] = []

    def stop() -> bool:
        calls.append(None)
        return len(calls) > 2

    with _connected(served, saved_teacher) as teacher:
        plan = _plan(corpus, saved_teacher, teacher, tmp_path / "store")
        capture_split(plan, teacher, stop=stop)
        assert len(open_store(plan.folder, incomplete=True).done) > 0
        for weight in served.model.parameters():
            weight.data.mul_(0.9)
        with pytest.raises(ColdstillError, match="now has another model than the one that began"):
            capture_split(plan, teacher)


def test_answers_of_a_server_are_captured(
    corpus: SmallCorpus, saved_teacher: Path, served: Served, tmp_path: Path
) -> None:
    with _connected(served, saved_teacher) as teacher:
        generate, store = GenerateConfig(max_new_tokens=5), tmp_path / "store"
        plan = _plan(
            corpus,
            saved_teacher,
            teacher,
            store,
            generate=generate,
            sequence_length=64,
        )
        read = plan.sequences.read
        single = [row for row in plan.rows if len(read(np.array([row])).document_starts[0]) == 1]
        plan = dataclasses.replace(plan, rows=np.array(single))
        capture_split(plan, teacher)
    block = open_store(store).read(np.arange(len(single)))
    for row in range(len(block.sequences)):
        answer = block.sequences.tokens[row][block.sequences.positions[row] + 1]
        assert 1 <= len(answer) <= 5
    # the stand-in answers with the most probable token
    tokens, head = block.sequences.tokens, block.targets.head_ids[:, 0]
    places = np.concatenate(
        [tokens[row][block.sequences.positions[row] + 1] for row in range(len(block.sequences))]
    )
    assert np.array_equal(places, head)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"longest": LENGTH}, f"takes texts of at most {LENGTH - 1} tokens"),
        ({"shifted": 1}, "its tokenizer is not that of teacher.model: token 0 is"),
        ({"name": "other"}, "it serves other, and not 'served'"),
    ],
)
def test_a_server_that_does_not_fit_is_refused(
    saved_teacher: Path, served: Served, change: dict[str, Any], text: str
) -> None:
    for name, value in change.items():
        setattr(served, name, value)
    with pytest.raises(ColdstillError, match=text):
        _connected(served, saved_teacher, model="served")


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"most": 3}, r"refused \(400\): more than 3 asked"),
        ({"temperature": 0.5}, "the probabilities of 6 tokens sum to"),
        ({"real": 0}, "the tokenizer of teacher.model has"),
    ],
)
def test_records_that_are_not_the_models_are_refused(
    corpus: SmallCorpus,
    saved_teacher: Path,
    served: Served,
    tmp_path: Path,
    change: dict[str, Any],
    text: str,
) -> None:
    with _connected(served, saved_teacher) as teacher:
        plan = _plan(corpus, saved_teacher, teacher, tmp_path / "store")
        for name, value in change.items():
            padded = served.model.config.vocab_size  # with padding rows, which win
            setattr(served, name, padded if name == "real" else value)
        with pytest.raises(ColdstillError, match=text):
            capture_split(plan, teacher)
    assert not (tmp_path / "store").exists() or not open_store(plan.folder, incomplete=True).done


def _nothing(listed: list[Any]) -> None:
    for entry in listed[-1].values():
        entry["logprob"] = -9999.0


def _low(listed: list[Any]) -> None:
    for own in listed[1:]:
        for entry in own.values():
            entry["logprob"] -= 40.0


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (_nothing, "it lists a token of probability 0"),
        (_low, "not the head of a distribution"),
        (lambda listed: listed.append(listed.pop(1)), "its answer is about other tokens"),
        (lambda listed: listed.__setitem__(-1, None), "its answer is not like one of vLLM"),
        (lambda listed: listed.pop(), "it gives no prompt_logprobs for"),
    ],
)
def test_answers_that_are_no_records_are_refused(
    saved_teacher: Path, served: Served, change: Any, text: str
) -> None:
    document, places = [5, 9, 30, 2, 7], np.arange(4)
    with _connected(served, saved_teacher) as teacher:
        served.change = change
        with pytest.raises(ColdstillError, match=text):
            teacher.server.listed(document, places, 6)


def test_a_model_that_changes_within_a_run_is_noticed(
    corpus: SmallCorpus, saved_teacher: Path, served: Served, tmp_path: Path
) -> None:
    def other(listed: list[Any]) -> None:
        for own in listed[1:]:
            for entry in own.values():
                entry["logprob"] = 0.8 * entry["logprob"] - 0.5

    with _connected(served, saved_teacher, requests=1) as teacher:
        plan = _plan(corpus, saved_teacher, teacher, tmp_path / "store")
        capture_split(dataclasses.replace(plan, rows=plan.rows[:4]), teacher)
        served.failures, served.change = [503], other
        with pytest.raises(ColdstillError, match="it now has another model than before"):
            teacher.server.submit([[5, 9, 30]], [np.arange(2)], 6)[0].result()


def test_a_failure_ends_requests_that_wait(saved_teacher: Path, served: Served) -> None:
    with _connected(served, saved_teacher, requests=2) as teacher:
        served.hangs.set()
        waiting = teacher.server.submit([[5, 9, 30]] * 2, [np.arange(2)] * 2, 6)
        time.sleep(0.1)
        begun = time.monotonic()
        teacher.server._http.abort(ColdstillError("the first failure"))
        for each in waiting:
            with pytest.raises(ColdstillError, match="the first failure"):
                each.result(10)
        assert time.monotonic() - begun < 5


def test_a_capture_that_is_to_stop_does_not_wait_for_a_server(
    corpus: SmallCorpus, saved_teacher: Path, served: Served, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(served_module, "_GRACE", 0.1)
    monkeypatch.setattr(served_module, "_POLL", 0.1)
    with _connected(served, saved_teacher) as teacher:
        plan = _plan(corpus, saved_teacher, teacher, tmp_path / "store")
        served.hangs.set()
        with pytest.raises(StoppedError):
            capture_split(plan, teacher, stop=lambda: True)
    assert not (tmp_path / "store").exists()


def test_a_key_that_cannot_be_sent_is_not_shown(
    saved_teacher: Path, served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLDSTILL_SERVER_KEY", "sk-secret\x07part")
    with pytest.raises(ColdstillError, match="COLDSTILL_SERVER_KEY: it has characters") as caught:
        _connected(served, saved_teacher)
    assert "secret" not in str(caught.value)


def test_no_server_and_no_json_are_one_line(saved_teacher: Path, served: Served) -> None:
    served.url = served.url.removesuffix("/v1") + "/elsewhere"
    with pytest.raises(ColdstillError, match=r"/v1/models: refused \(404\): it failed"):
        _connected(served, saved_teacher)
    served.url = "http://127.0.0.1:9/v1"
    with pytest.raises(ColdstillError, match="still failing after 4 tries"):
        _connected(served, saved_teacher)
