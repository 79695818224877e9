"""All benchmarks, each in a process of its own: `make bench`."""

from __future__ import annotations

import estimator
import store_codecs
import store_opening
import student_step
import teacher_forward
import teacher_processes
from measure import alone

if __name__ == "__main__":
    for benchmark in (
        store_codecs,
        estimator,
        store_opening,
        student_step,
        teacher_forward,
        teacher_processes,
    ):
        alone(benchmark.main)
