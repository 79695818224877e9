"""Results of lm-eval tasks."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """A model's figure in one metric. NaN and infinite figures are None."""

    value: float | None
    stderr: float | None = None
    higher_is_better: bool | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskResult:
    """A model's result in a task, or its aggregated result in a group."""

    task: str
    metrics: dict[str, Score]
    """Scores by metric, or by `metric,filter` for filters other than lm-eval's default."""
    main: str | None
    """The first metric that the task file lists; None for a group without aggregation."""
    examples: int
    few_shot: int = 0
    version: str | None = None
    """Version that the task file states."""


def task_result(name: str, found: Mapping[str, Any], group: Any) -> TaskResult:
    """The result of a task or group in what lm-eval's `evaluate` returned.

    group  lm-eval's `Group`; None for a task
    """
    figures = found["results"][name]
    better = found["higher_is_better"].get(name, {})
    metrics = {}
    for key, value in figures.items():
        metric, comma, kind = key.partition(",")
        if comma and not metric.endswith("_stderr"):
            metrics[metric if kind == "none" else key] = Score(
                value=_finite(value),
                stderr=_finite(figures.get(f"{metric}_stderr,{kind}")),
                higher_is_better=better.get(metric),
            )
    if group is None:
        listed = [entry.get("metric") for entry in found["configs"][name].get("metric_list") or ()]
    else:
        listed = [entry.metric for entry in group.aggregate_metric_list or ()]
    version = found["versions"].get(name)
    firsts = [key for key in metrics if listed and key.partition(",")[0] == listed[0]]
    return TaskResult(
        task=name,
        metrics=metrics,
        main=next(iter([*firsts, *metrics]), None),
        examples=int(figures.get("sample_len", 0)),
        few_shot=int(found["n-shot"].get(name) or 0),
        version=None if version in (None, "Yaml", "N/A") else str(version),  # lm-eval's "none"
    )


def _finite(value: Any) -> float | None:
    """A figure as a finite float. lm-eval writes "N/A" for a missing one."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) else None
