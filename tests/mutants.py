"""Deliberate faults, and the tests that must find them: `make mutants`.

Each mutant replaces a line of the source in a copy of the tree and runs the fast tests of some
files. A fault is found if a test fails. The script fails if a fault survives, if the line of a
fault no longer exists, or if the tests fail without any fault.
"""

from __future__ import annotations

import multiprocessing
import os
import shutil
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

ROOT = Path(__file__).parents[1]
IGNORED = (".git", ".venv", ".links", "runs", "build", "*.egg-info", "__pycache__", ".*_cache")
WORKERS = 2


@dataclass(frozen=True, slots=True)
class Mutant:
    """One fault."""

    name: str
    file: str
    line: str
    """Text that occurs once in the file."""
    fault: str
    """What replaces it."""
    tests: tuple[str, ...]
    """Test files below `tests/` that must find it."""


MUTANTS = (
    Mutant(
        "a word that was drawn twice beside the text counts once",
        "data/retokenized/drawn.py",
        "(each_B * drawn_E[found])",
        "(each_B)",
        ("data/test_retokenize_branches.py",),
    ),
    Mutant(
        "a word beside the text does not see its own earlier tokens",
        "stages/models/branching.py",
        "own = within_X >= back",
        "own = within_X > back",
        ("stages/test_branches.py",),
    ),
    Mutant(
        "a word beside the text has the position of the token before it",
        "stages/models/branching.py",
        "text.positions[row_X, place_X] + 1 + within",
        "text.positions[row_X, place_X] + within",
        ("stages/test_branches.py",),
    ),
    Mutant(
        "every word beside the text weighs the same",
        "stages/targets/losses/branches.py",
        "SparseGradient(-student.label_logprob * weights, weights, ids, entries)",
        "SparseGradient(-student.label_logprob, weights, ids, entries)",
        ("stages/test_branches.py",),
    ),
    Mutant(
        "a mixture reads no text that the student wrote",
        "stages/training/feed.py",
        "is_theirs_N = np.diff(self._theirs(places_N)) > 0",
        "is_theirs_N = np.diff(self._theirs(places_N)) < 0",
        ("stages/test_feed.py",),
    ),
    Mutant(
        "a student learns the prompts of its own text",
        "stages/students/rounds/writing.py",
        "np.arange(len(text)) >= len(prompt.tokens_T)",
        "np.arange(len(text)) >= 0",
        ("pipeline/test_rounds.py",),
    ),
    Mutant(
        "a loss on distributions reads what is inside a chunk of text",
        "stages/training/chunked_loss.py",
        "sparse = sparse.at(own.known, own)",
        "sparse = sparse.at(own.known | True, own)",
        ("stages/test_retokenized.py",),
    ),
    Mutant(
        "the likelihood of a chunk of text is divided between two parts of the positions",
        "stages/training/chunked_loss.py",
        "if following - start > most and at > start:",
        "if at - start >= most:",
        ("stages/test_retokenized.py",),
    ),
    Mutant(
        "a chunk of text has the log-probability of its first label alone",
        "data/retokenized/documents.py",
        "sums_C = np.add.reduceat(known_T, found.teacher_C)",
        "sums_C = known_T[found.teacher_C]",
        ("data/test_retokenize.py",),
    ),
    Mutant(
        "a chunk of text that is learned in part counts as learned",
        "data/retokenized/documents.py",
        "learned_C = np.add.reduceat(rows_T >= 0, found.teacher_C) == found.teacher_counts_C",
        "learned_C = np.add.reduceat(rows_T >= 0, found.teacher_C) > 0",
        ("data/test_retokenize.py",),
    ),
    Mutant(
        "samples that join a head are counted outside it, too",
        "data/retokenized/records.py",
        "same_D &= sums_at(rows, ~exact, count) == 0",
        "same_D |= sums_at(rows, ~exact, count) == 0",
        ("data/test_retokenize_mapping.py",),
    ),
    Mutant(
        "inside a chunk, the mean over the store counts beside the head, too",
        "data/retokenized/continued.py",
        "masses - mean_V[tokens] * scale_I[at]",
        "masses",
        ("data/test_retokenize_continued.py",),
    ),
    Mutant(
        "inside a chunk, the token of the text counts twice",
        "data/retokenized/continued.py",
        "kept &= tokens != inside.firsts_I[at]",
        "kept &= tokens >= 0",
        ("data/test_retokenize_continued.py",),
    ),
    Mutant(
        "names of special tokens in a text become special tokens of the student",
        "data/retokenized/spelling.py",
        "tokenizer.encode_special_tokens = True  #",
        "tokenizer.encode_special_tokens = False  #",
        ("data/test_retokenize.py",),
    ),
    Mutant(
        "a worker of a Ray cluster captures shards that it was not given",
        "stages/capture/shards.py",
        "in self._source or self._claims():",
        "in self._claims():",
        ("pipeline/test_ray.py",),
    ),
    Mutant(
        "a worker that is told to stop measures the teacher first",
        "pipeline/steps/on_ray/worker.py",
        'stop=lambda: self._ending == "stop",',
        "stop=lambda: False,",
        ("pipeline/test_ray.py",),
    ),
    Mutant(
        "each job of an array asks for all nodes",
        "pipeline/launch/slurm.py",
        "replace(task, nodes=1)",
        "replace(task, nodes=task.nodes)",
        ("pipeline/test_launch.py",),
    ),
    Mutant(
        "labels are shifted by one position",
        "data/alignment.py",
        "return sequences.positions.values + np.int32(1)",
        "return sequences.positions.values + np.int32(0)",
        ("data/test_alignment.py",),
    ),
    Mutant(
        "the first token of a document is predicted from the document before",
        "data/alignment.py",
        "predictable_T[document_starts_D] = False",
        "predictable_T[document_starts_D[:1]] = False",
        ("data/test_alignment.py", "data/test_packing.py"),
    ),
    Mutant(
        "the isolation mask shows the neighbouring documents",
        "stages/models/inputs.py",
        "return same.logical_and_(",
        "return (same | True).logical_and_(",
        ("stages/test_isolation.py",),
    ),
    Mutant(
        "one limit of rounding for all positions",
        "stages/models/rounding.py",
        "(NOISE * noise_T).clamp(min=usual)",
        "usual",
        ("stages/test_isolation.py",),
    ),
    Mutant(
        "a model that amplifies rounding everywhere passes for tested",
        "stages/models/rounding.py",
        "return bool(tested and",
        "return bool(True and",
        ("stages/test_isolation.py",),
    ),
    Mutant(
        "a sliding window is one token too long",
        "stages/models/inputs.py",
        "positions_BT[:, :, None] < positions_BT[:, None] + window",
        "positions_BT[:, :, None] <= positions_BT[:, None] + window",
        ("stages/test_isolation.py", "stages/test_branches.py"),
    ),
    Mutant(
        "the masks of a teacher have no windows",
        "stages/models/output_head.py",
        "model.dtype, attention_windows(model.config))",
        "model.dtype)",
        ("stages/test_isolation.py",),
    ),
    Mutant(
        "the masks of a training have no windows",
        "stages/training/loop.py",
        "windows=attention_windows(model.config)",
        "windows={}",
        ("stages/test_training.py",),
    ),
    Mutant(
        "models whose layers read across masks learn from branches",
        "stages/models/branching.py",
        "and follows_masks(",
        "or follows_masks(",
        ("stages/test_branches.py",),
    ),
    Mutant(
        "position ids continue over documents",
        "stages/models/inputs.py",
        "np.arange(length) - starts[documents[row]]",
        "np.arange(length)",
        ("stages/test_isolation.py",),
    ),
    Mutant(
        "the chat's learned text begins one character late",
        "stages/corpus/chat_turns.py",
        "len(span.before) + edges.header",
        "len(span.before) + edges.header + 1",
        ("stages/test_render_chat.py",),
    ),
    Mutant(
        "the token that ends a turn is not learned",
        "stages/corpus/chat_turns.py",
        "end = span.end + edges.closing",
        "end = span.end",
        ("stages/test_render_chat.py",),
    ),
    Mutant(
        "padded rows of the vocabulary count",
        "stages/models/output_head.py",
        "            return guess\n",
        "            return type(guess)(model, len(guess.weight), guess.scale, guess.softcap)\n",
        ("stages/test_output_head.py", "stages/test_teacher_logits.py"),
    ),
    Mutant(
        "the ids of the head are swapped",
        "stages/capture/selection.py",
        "return values, ids",
        "return values, ids.flip(1)",
        ("stages/test_selection.py",),
    ),
    Mutant(
        "tail samples are biased",
        "stages/capture/selection.py",
        "(uniform_M[:, None] + steps_R) / r",
        "(uniform_M[:, None] / 2 + steps_R) / r",
        ("stages/test_selection.py",),
    ),
    Mutant(
        "the tail's mass is computed as 1 - sum",
        "stages/capture/selection.py",
        "log_tail_M = mass_MN.sum(1).log()",
        "log_tail_M = (1 - (head_logits - log_sum_M[:, None]).exp().sum(1)).clamp(min=0).log()",
        ("stages/test_selection.py",),
    ),
    Mutant(
        "the entropy has a wrong sign",
        "stages/capture/selection.py",
        "(log_sum_M - dots_M)",
        "(log_sum_M + dots_M)",
        ("stages/test_selection.py",),
    ),
    Mutant(
        "the tail is missing in the gradient of KL",
        "stages/targets/losses/forward_kl.py",
        "-teacher.head, tail=-teacher.tail)",
        "-teacher.head, tail=0 * teacher.tail)",
        ("stages/test_losses.py",),
    ),
    Mutant(
        "the student's mass outside the head is computed as 1 - sum",
        "stages/targets/softmax.py",
        "rest = self.probs_MV.sum(1)",
        "rest = 1 - head.sum(1)",
        ("stages/test_losses.py",),
    ),
    Mutant(
        "samples are not reweighted to the temperature",
        "stages/targets/tensors.py",
        "tail.logprobs * (1.0 / temperature - 1.0)",
        "tail.logprobs * 0.0",
        ("stages/test_losses.py",),
    ),
    Mutant(
        "the gradient lacks a factor of T",
        "stages/training/chunked_loss.py",
        "[term.weight * term.share * temperature for",
        "[term.weight * term.share for",
        ("stages/test_chunked_loss.py",),
    ),
    Mutant(
        "the loss has T instead of T squared",
        "stages/training/chunked_loss.py",
        "t.temperature**2",
        "t.temperature",
        ("stages/test_chunked_loss.py",),
    ),
    Mutant(
        "the loss is a mean over processes instead of positions",
        "stages/training/loop.py",
        'output["loss"] / num_items_in_batch',
        'output["loss"] / len(inputs["labels"])',
        ("stages/test_training.py",),
    ),
    Mutant(
        "the order is the same in every epoch",
        "data/order.py",
        "np.random.PCG64([seed, epoch])",
        "np.random.PCG64([seed])",
        ("data/test_order.py",),
    ),
    Mutant(
        "the order does not depend on the seed",
        "data/order.py",
        "np.random.PCG64([seed, epoch])",
        "np.random.PCG64([epoch])",
        ("data/test_order.py",),
    ),
    Mutant(
        "a training that resumes in the middle of an epoch skips too few sequences",
        "data/order.py",
        "seen = max(0, seen - len(order))",
        "seen = 0",
        ("data/test_order.py",),
    ),
    Mutant(
        "a process claims every shard that others have finished",
        "stages/capture/shards.py",
        "if is_old:",
        "if False:",
        ("stages/test_teacher_logits.py",),
    ),
    Mutant(
        "all positions of a sequence are sampled at the same point",
        "data/order.py",
        "state ^ positions.astype(np.uint64)",
        "state ^ (0 * positions).astype(np.uint64)",
        ("data/test_order.py",),
    ),
    Mutant(
        "a label that was not drawn is expected to be less likely",
        "data/codecs/compact/drawn.py",
        "_UNSEEN = 0.35",
        "_UNSEEN = 0.3",
        ("data/test_golden.py",),
    ),
    Mutant(
        "samples are expected to lack less of the entropy",
        "data/codecs/compact/drawn.py",
        "_LINEAR, _SQUARE = 0.6, 2.0",
        "_LINEAR, _SQUARE = 0.6, 1.9",
        ("data/test_golden.py",),
    ),
    Mutant(
        "entropies are added up in coarser parts",
        "data/codecs/compact/drawn.py",
        "_FINE = 256",
        "_FINE = 16",
        ("data/test_golden.py",),
    ),
    Mutant(
        "a token that was drawn often, but last, is drawn once more",
        "data/codecs/compact/drawn.py",
        "counts[self._last] = left + 1",
        "counts[self._last] = left + 2",
        ("data/test_codecs.py",),
    ),
    Mutant(
        "fewer gaps take one byte",
        "data/codecs/compact/gaps.py",
        "self._direct = classes * 5 // 8",
        "self._direct = classes * 9 // 16",
        ("data/test_golden.py",),
    ),
    Mutant(
        "more gaps take three bytes",
        "data/codecs/compact/gaps.py",
        "self._narrow_end = classes * 7 // 8",
        "self._narrow_end = classes * 13 // 16",
        ("data/test_golden.py",),
    ),
    Mutant(
        "gaps are in other lists",
        "data/codecs/compact/gaps.py",
        "ends = -(-places // QUARTERS)",
        "ends = (places // QUARTERS)",
        ("data/test_golden.py",),
    ),
    Mutant(
        "ranks beyond the vocabulary are read",
        "data/codecs/compact/gaps.py",
        "if largest >= len(tokens_V):",
        "if largest > len(tokens_V) << 8:",
        ("data/test_compact_damage.py",),
    ),
    Mutant(
        "a step of a log-probability is another part of a nat",
        "data/codecs/compact/rounding.py",
        "STEPS = 64",
        "STEPS = 63",
        ("data/test_golden.py",),
    ),
    Mutant(
        "a right angle has other steps",
        "data/codecs/compact/rounding.py",
        "_ANGLES = 4095",
        "_ANGLES = 4094",
        ("data/test_golden.py",),
    ),
    Mutant(
        "the lowest level has another weight",
        "data/codecs/compact/rounding.py",
        "root[0] = 0.25 / levels",
        "root[0] = 0.3 / levels",
        ("data/test_golden.py",),
    ),
    Mutant(
        "a label behind the head is expected to be more likely",
        "data/codecs/compact/record.py",
        "_BEHIND = 2 * STEPS",
        "_BEHIND = 2 * STEPS - 8",
        ("data/test_golden.py",),
    ),
    Mutant(
        "what is behind the head is expected to be more spread",
        "data/codecs/compact/record.py",
        "_SPREAD = 4.0",
        "_SPREAD = 4.5",
        ("data/test_golden.py",),
    ),
    Mutant(
        "a code may name the entry after the last",
        "data/codecs/compact/record.py",
        "(places <= drawn.sizes[in_tail]).all()",
        "(places <= drawn.sizes[in_tail] + 1).all()",
        ("data/test_compact_damage.py",),
    ),
    Mutant(
        "sizes beyond the draws are read",
        "data/codecs/compact/drawn.py",
        "if sizes.max(initial=1) > draws:",
        "if sizes.max(initial=1) > 2 * draws:",
        ("data/test_compact_damage.py",),
    ),
    Mutant(
        "counts beyond the draws are read",
        "data/codecs/compact/drawn.py",
        "if stored.max(initial=0) > max(0, draws - 2):",
        "if stored.max(initial=0) > 255:",
        ("data/test_compact_damage.py",),
    ),
    Mutant(
        "tokens that occur together are apart",
        "data/codecs/compact/ordering.py",
        "mean_M[rows], minlength",
        "mean_M[rows[::-1]], minlength",
        ("data/test_codecs.py",),
    ),
    Mutant(
        "compiled loops put a sample into another quarter",
        "data/codecs/compact/loops.py",
        "            end = ((quarter + 1) * sizes_M[m] + 3) // 4\n            symbols, place",
        "            end = ((quarter + 1) * sizes_M[m] + 2) // 4\n            symbols, place",
        ("data/test_compiled.py",),
    ),
    Mutant(
        "compiled loops take another sample for the one that was drawn most often",
        "data/codecs/compact/loops.py",
        "if count > most:",
        "if count >= most:",
        ("data/test_compiled.py",),
    ),
    Mutant(
        "compiled loops unfold another difference",
        "data/codecs/compact/loops.py",
        "return -half - 1 if folded & 1 else half",
        "return -half if folded & 1 else half",
        ("data/test_compiled.py",),
    ),
    Mutant(
        "the hashes of sequences are not checked on reading",
        "data/store/reader.py",
        "check_hashes(block.sequences)",
        "pass",
        ("data/test_reader.py",),
    ),
    Mutant(
        "a shard is committed before its data is in place",
        "data/store/writer.py",
        "            self.place.adopt(made, name)\n",
        '            self.place.write(commit_name(shard), b"{}")\n'
        "            self.place.adopt(made, name)\n",
        ("data/test_writer.py",),
    ),
)


def copy_tree(folder: Path) -> Path:
    """The sources under the name by which they are imported."""
    return Path(
        shutil.copytree(ROOT, folder / "coldstill", ignore=shutil.ignore_patterns(*IGNORED))
    )


def run_tests(tree: Path, tests: tuple[str, ...]) -> tuple[int, str]:
    """Run the fast tests of some files in a copy; pytest's exit status and output.

    The calling process must not have imported coldstill.
    """
    import pytest

    sys.path.insert(0, str(tree.parent))
    os.environ |= {"PYTHONPATH": str(tree.parent), "OMP_NUM_THREADS": "1"}
    os.chdir(tree.parent)
    sys.dont_write_bytecode = True
    # the platform's own way to start processes, not that of the process that forked this one
    multiprocessing.set_start_method(multiprocessing.get_all_start_methods()[0], force=True)
    written = tree.parent / "output.txt"
    with written.open("w", encoding="utf-8") as output:
        for descriptor in (1, 2):
            os.dup2(output.fileno(), descriptor)
        options = ["-q", "-x", "-n0", "-m", "not slow", "-p", "no:cacheprovider"]
        options += ["-W", "ignore::pytest.PytestAssertRewriteWarning"]  # loaded beforehand
        place = ["--rootdir", str(tree), "-c", str(tree / "pyproject.toml")]
        status = pytest.main([*options, *place, *(str(tree / "tests" / name) for name in tests)])
    return int(status), written.read_text(encoding="utf-8")


def apply(mutant: Mutant, tree: Path) -> None:
    """Put the fault into the copy; ends the script if its line is not there exactly once."""
    path = tree / mutant.file
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    if text.count(mutant.line) != 1:
        raise SystemExit(
            f"tests/mutants.py: {mutant.name}: found {text.count(mutant.line)} times in "
            f"{mutant.file}, expected once: {mutant.line.strip()!r}; adapt the mutant to the source"
        )
    path.write_text(text.replace(mutant.line, mutant.fault), encoding="utf-8")


def tried(mutant: Mutant) -> tuple[int, str, float]:
    """Run the tests with a fault: pytest's exit status and output, and the seconds it took."""
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        tree = copy_tree(Path(folder))
        apply(mutant, tree)
        return *run_tests(tree, mutant.tests), time.monotonic() - started


def tried_without_fault(tests: tuple[str, ...]) -> tuple[int, str]:
    """Run all chosen tests on an unchanged copy."""
    with tempfile.TemporaryDirectory() as folder:
        return run_tests(copy_tree(Path(folder)), tests)


def expect_lines(mutants: Sequence[Mutant]) -> None:
    """End the script if the line of a fault is missing."""
    with tempfile.TemporaryDirectory() as folder:
        for mutant in mutants:
            copied = Path(folder) / mutant.file
            copied.parent.mkdir(parents=True, exist_ok=True)
            if (ROOT / mutant.file).exists():
                shutil.copyfile(ROOT / mutant.file, copied)
            apply(mutant, Path(folder))


def main() -> None:
    """Try the mutants whose names contain the words of the command line, or all of them."""
    words = " ".join(sys.argv[1:])
    chosen = [mutant for mutant in MUTANTS if words in mutant.name]
    if not chosen:
        raise SystemExit(f"tests/mutants.py: no mutant has {words!r} in its name")
    expect_lines(chosen)
    # every task gets a new process, copied from one that has loaded the slow libraries
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["pytest", "torch", "transformers"])
    survived = 0
    with ProcessPoolExecutor(WORKERS, context, max_tasks_per_child=1) as pool:
        tests = tuple(sorted({name for mutant in chosen for name in mutant.tests}))
        unchanged = pool.submit(tried_without_fault, tests)
        for mutant, (status, output, seconds) in zip(chosen, pool.map(tried, chosen), strict=True):
            if status not in (0, 1):
                raise SystemExit(f"tests/mutants.py: {mutant.name}: pytest failed:\n{output}")
            survived += status == 0
            result = "found" if status else "SURVIVED"
            print(f"{result:<9} {seconds:4.0f} s  {mutant.name}", flush=True)
        status, output = unchanged.result()
    if status:
        raise SystemExit(f"tests/mutants.py: the tests fail without any fault:\n{output}")
    print(f"{len(chosen) - survived} of {len(chosen)} faults found")
    raise SystemExit(survived > 0)


if __name__ == "__main__":
    main()
