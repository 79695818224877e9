"""Grids as they are typed, and the names of their points."""

from __future__ import annotations

import re
from typing import Any

import pytest
from coldstill.data.errors import ColdstillError
from coldstill.pipeline.recipe.reading import split_key
from coldstill.pipeline.recipe.reference import student_keys
from coldstill.pipeline.recipe.tables import NAME_PATTERN
from coldstill.pipeline.steps.sweep import Grid, points_of, read_grids

STUDENTS = ("small", "small-learning_rate-0.003")


def values(text: str) -> tuple[Any, ...]:
    (grid,) = read_grids([f"students.small.train.x={text}"], STUDENTS)
    return grid.values


def names(*grids: tuple[str, list[Any]], student: str = "small") -> list[str]:
    made = [Grid(student=student, key=tuple(k.split(".")), values=tuple(v)) for k, v in grids]
    return [point.name for point in points_of(made)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1e-3,3e-3", (1e-3, 3e-3)),
        ("1, 2 ,3", (1, 2, 3)),
        ("cosine,linear", ("cosine", "linear")),
        ("0.5,cosine,true", (0.5, "cosine", True)),
        ('"a,b",c', None),
        ('"a,b","c"', ("a,b", "c")),
        ("[0,3],[0,1,2]", ([0, 3], [0, 1, 2])),
        ("{every=2},[0,3]", ({"every": 2}, [0, 3])),
        ('{weight=1,schedule="wsd"},0.5', ({"weight": 1, "schedule": "wsd"}, 0.5)),
        ("./a,ORG/NAME", ("./a", "ORG/NAME")),
        ("1]\nother = [2", None),
        ("[0,3", None),
        ("a,,b", None),
        ("", None),
        (",", None),
    ],
)
def test_values_are_toml_or_bare_words(text: str, expected: tuple[Any, ...] | None) -> None:
    if expected is not None:
        assert values(text) == expected
        return
    with pytest.raises(ColdstillError, match="expected values separated by commas, as in TOML"):
        values(text)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("seed=1,2", "another seed of the recipe would need another store; sweep students.NAME"),
        ("logits.head=1,2", "only keys below students. can be swept: another logits.head would n"),
        ("students=1", "expected a student's key, students.NAME.KEY=V1,V2"),
        ("students.small=1", "expected a student's key, students.NAME.KEY=V1,V2"),
        ("students.smal.train.steps=1", "no student 'smal' (have: small, small-learning_rate-0.0"),
        ("students.small.train.steps", "expected students.NAME.KEY=V1,V2"),
        ("students.small.=1", "expected students.NAME.KEY=V1,V2"),
        ("=1", "expected students.NAME.KEY=V1,V2"),
    ],
)
def test_keys_that_cannot_be_swept_are_refused(text: str, said: str) -> None:
    with pytest.raises(ColdstillError) as error:
        read_grids([text], STUDENTS)
    assert str(error.value).startswith(f"--grid {text}: {said}")


def test_one_key_has_one_grid() -> None:
    key = "students.small.train"
    with pytest.raises(ColdstillError, match="this key has a grid already; give all its values in"):
        read_grids([f"{key}.steps=1", f"{key}.warmup=0", f"{key}.steps=2"], STUDENTS)
    pair = [f"{key}.steps=1", f"{key}={{steps=2}}"]
    for order in (pair, pair[::-1]):
        with pytest.raises(ColdstillError, match="steps is a part of train, which has a grid too"):
            read_grids(order, STUDENTS)
    other = "students.small-learning_rate-0.003.train"
    assert len(read_grids([f"{key}.steps=1", f"{other}.steps=1"], STUDENTS)) == 2


def test_a_students_name_can_contain_dots() -> None:
    parts = ["students", "small-learning_rate-0.003", "train", "steps"]
    assert split_key(".".join(parts), STUDENTS) == parts
    assert split_key('students."a.b".train.steps', ()) == ["students", "a.b", "train", "steps"]
    assert split_key("students.small.train.steps", STUDENTS) == [
        "students", "small", "train", "steps",
    ]  # fmt: skip
    assert split_key("students.small.", STUDENTS) is None
    assert split_key("students.small", STUDENTS) == ["students", "small"]


def test_grids_of_a_student_make_a_product_and_students_do_not() -> None:
    grids = read_grids(
        [
            "students.small.train.steps=1,2",
            "students.small-learning_rate-0.003.train.steps=5,6",
            "students.small.train.learning_rate=1e-3,3e-3",
        ],
        STUDENTS,
    )
    assert [point.name for point in points_of(grids)] == [
        "small-learning_rate-0.001-steps-1",
        "small-learning_rate-0.001-steps-2",
        "small-learning_rate-0.003-steps-1",
        "small-learning_rate-0.003-steps-2",
        "small-learning_rate-0.003-steps-5",
        "small-learning_rate-0.003-steps-6",
    ]


def test_names_do_not_depend_on_the_order_of_options_or_on_other_values() -> None:
    first = ("train.steps", [1, 2])
    second = ("train.learning_rate", [0.1, 0.2])
    assert names(first, second) == names(second, first)
    assert set(names(first, second)) < set(names(first, (second[0], [0.1, 0.2, 0.3])))


def test_equal_numbers_have_one_name() -> None:
    for first, second, name in (
        (3e-3, 0.003, "0.003"),
        (1, 1.0, "1"),
        (1e3, 1000, "1000"),
        (0.00001, 1e-5, "1e-5"),
        (-0.5, -5e-1, "-0.5"),
    ):
        assert names(("train.learning_rate", [first, second])) == [f"small-learning_rate-{name}"]


@pytest.mark.parametrize(
    ("key", "suffix"),
    [
        ("train.learning_rate", "learning_rate"),
        ("train.warmup", "train.warmup"),  # of a weight that changes too
        ("train.schedule", "train.schedule"),
        ("objective.kl", "kl"),
        ("objective.kl.weight", "kl.weight"),
        ("layers", "layers"),
        ("architecture.layers", "architecture.layers"),
        ("architecture.hidden", "hidden"),
        ("lora.rank", "rank"),
        ("train.trainer.adam_beta1", "adam_beta1"),
        ("train.trainer.weight_decay", "trainer.weight_decay"),
    ],
)
def test_a_key_is_named_by_its_shortest_unique_end(key: str, suffix: str) -> None:
    assert names((key, [1])) == [f"small-{suffix}-1"]


def test_no_two_keys_of_a_student_have_one_name() -> None:
    keys = sorted(".".join(key) for key in student_keys())
    assert {"train.steps", "objective.jsd.schedule", "layers.every"} <= set(keys)
    found = [names((key, [1]))[0] for key in keys]
    assert len(set(found)) == len(keys)


@pytest.mark.parametrize(
    ("value", "pattern"),
    [
        (True, "true"),
        ("cosine", "cosine"),
        ("50%", "50pct"),
        ("12.5%", "12.5pct"),
        ([0, 3], "0_3"),
        ([0.5], "[0-9a-f]{8}"),
        ({"every": 2}, "[0-9a-f]{8}"),
        ("../up/ORG/NAME", "[0-9a-f]{8}"),
        ("two words", "[0-9a-f]{8}"),
        ("x" * 40, "[0-9a-f]{8}"),
        (list(range(40)), "[0-9a-f]{8}"),
    ],
)
def test_every_value_gives_a_valid_folder_name(value: Any, pattern: str) -> None:
    (name,) = names(("objective.kl", [value]))
    assert re.fullmatch(f"small-kl-{pattern}", name)
    assert re.fullmatch(NAME_PATTERN, name)


def test_equal_tables_have_one_name() -> None:
    one, other = {"weight": 1.0, "start": 1e-1}, {"start": 0.1, "weight": 1}
    assert len(names(("objective.kl", [one, other]))) == 1
    assert len(names(("objective.kl", [one, {**one, "start": 0.2}]))) == 2


def test_long_names_are_replaced_by_digests() -> None:
    grids = [(f"train.trainer.{letter * 30}", [1, 2]) for letter in "abcdefgh"]
    found = names(*grids)
    assert len(set(found)) == 2**8
    assert all(re.fullmatch("small-[0-9a-f]{8}", name) for name in found)
    assert names(*grids) == found


def test_points_with_one_name_and_too_many_points_are_refused() -> None:
    with pytest.raises(ColdstillError, match="two points would both be called small-steps-1"):
        names(("train.steps", [1, "1"]))

    with pytest.raises(ColdstillError, match="1,001 points are more than 1,000; take fewer values"):
        names(("train.steps", [*range(1001)]))
