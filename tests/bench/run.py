"""Run all benchmarks, each in its own process: `make bench`."""

from __future__ import annotations

import estimator
import imports
import large_store
import online
import pruning
import store_codecs
import store_opening
import student_feed
import student_step
import teacher_forward
import teacher_processes
from measure import alone

if __name__ == "__main__":
    for benchmark in (
        store_codecs,
        estimator,
        store_opening,
        imports,
        student_step,
        student_feed,
        online,
        large_store,
        teacher_forward,
        teacher_processes,
        pruning,
    ):
        alone(benchmark.main)
