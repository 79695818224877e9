from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from coldstill.data.alignment import labels
from coldstill.data.schema import Capture
from coldstill.data.store.commit import block_statistics
from oracles import random_block


@pytest.mark.parametrize("head", [0, 3])
def test_statistics_are_those_of_a_loop(head: int) -> None:
    block = random_block(4, 9, Capture(head=head, tail=2))
    targets, labels_M = block.targets, labels(block.sequences)
    separator = int(labels_M[0])
    sums = dict.fromkeys(["loss", "entropy", "head", "correct", "mass", "separators"], 0.0)
    for m, label in enumerate(labels_M):
        sums["loss"] -= float(targets.label_logprob[m])
        sums["entropy"] += float(targets.entropy[m])
        sums["head"] += sum(float(np.exp(float(x))) for x in targets.head_logprobs[m])
        sums["correct"] += head > 0 and int(targets.head_ids[m][0]) == int(label)
        if label == separator:
            sums["separators"] += 1
            sums["mass"] += float(np.exp(float(targets.label_logprob[m])))
    found = block_statistics(block, (separator, 99), np.full(len(targets), 0.5))
    assert found.loss == pytest.approx(sums["loss"])
    assert found.entropy == pytest.approx(sums["entropy"])
    assert found.head_mass == pytest.approx(sums["head"])
    assert found.correct == sums["correct"]
    assert found.separators == sums["separators"] > 0
    assert found.separator_mass == pytest.approx(sums["mass"])
    assert found.distortion == len(targets) / 2
    assert block_statistics(block, (), np.zeros(len(targets))).separators == 0


def test_histograms_count_every_position_in_its_bin() -> None:
    block = random_block(4, 9)
    count = len(block.targets)
    entropy = np.resize([0.0, 0.49, 0.5, 3.2, 11.4, 11.6, 99.0], count).astype(np.float32)
    block = replace(block, targets=replace(block.targets, entropy=entropy))
    found = block_statistics(block, (), np.zeros(count))
    bins = [sum(min(int(e / 0.5), 23) == b for e in entropy.tolist()) for b in range(24)]
    assert found.entropy_bins == tuple(bins)
    masses = np.exp(block.targets.head_logprobs.astype(float)).sum(1).tolist()
    expected = [sum(min(int(m * 20), 19) == b for m in masses) for b in range(20)]
    assert found.mass_bins == tuple(expected)
    assert len(set(expected)) > 3
