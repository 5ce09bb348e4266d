"""Numbers in settings: each has a range, and what is outside is refused, with the flag."""

import math
from dataclasses import fields, is_dataclass
from typing import get_type_hints

import pytest

import eval as evaluation
import inspector
import train_flow
import train_rl
from grading import pairs
from infra.ranges import Range, check_values, parts_of, range_of
from infra.settings import change, flatten
from worlds import toy

CONFIGS = {
    "train_rl": train_rl.Config(),
    "train_flow": train_flow.Config(),
    "eval": evaluation.Config(),
    "inspector": inspector.Config(),
    "pairs": pairs.Settings("pairs.jsonl"),
    "toy": toy.World(),
}


def numeric_types(settings) -> dict[str, object]:
    """The types of nested settings that are numbers, by name."""
    types = get_type_hints(type(settings), include_extras=True)
    numeric = {}
    for field in fields(settings):
        value = getattr(settings, field.name)
        if is_dataclass(value):
            numeric |= numeric_types(value)
        elif {int, float} & set(parts_of(types[field.name])):
            numeric[field.name] = types[field.name]
    return numeric


FLAGS = [
    (script, name, kind)
    for script, config in CONFIGS.items()
    for name, kind in numeric_types(config).items()
]
# Negative numbers that a setting takes
SIGNED = {"dense_coef", "dense_clamp"}


def test_the_numbers_that_there_are():
    assert {"lr", "warmup", "seed", "reward_times", "save_every", "calibrate_at"} <= {
        name for _, name, _ in FLAGS
    }
    assert len(numeric_types(CONFIGS["train_rl"])) > 40


@pytest.mark.parametrize(("script", "name", "kind"), FLAGS)
def test_each_number_has_a_range_and_refuses_what_is_outside(script, name, kind):
    assert range_of(kind) is not None, f"give {name} of {script} a type of infra/ranges.py"
    config = CONFIGS[script]
    is_tuple = isinstance(flatten(config)[name], tuple) or "tuple" in str(kind)
    for value in (math.nan, math.inf, -math.inf, 1e30, 10**20, -5, "5", True):
        if value == -5 and name in SIGNED:
            continue
        changed = change(config, **{name: (value,) if is_tuple else value})
        flag = f"--{name.replace('_', '-')}={value}: expected a"
        with pytest.raises(ValueError) as refused:
            check_values(changed)
        assert str(refused.value).startswith(flag) and "\n" not in str(refused.value)


@pytest.mark.parametrize("script", CONFIGS)
def test_the_defaults_are_in_their_ranges(script):
    check_values(CONFIGS[script])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"warmup": -5.0}, "--warmup=-5.0: expected a number from 0 to 1"),
        ({"save_every": -1}, "--save-every=-1: expected a whole number from 0 to 1,000,000,000"),
        ({"lr": 0.0}, "--lr=0.0: expected a number above 0, at most 1,000,000"),
        ({"cache_share": 1.0}, "--cache-share=1.0: expected a number between 0 and 1"),
        ({"steps": 2.0}, "--steps=2.0: expected a whole number from 1 to 1,000,000,000"),
        ({"reward_times": ()}, "--reward-times: expected at least one number between 0 and 1"),
        ({"reward_times": (0.5, 1.0)}, "--reward-times=1.0: expected a number between 0 and 1"),
    ],
)
def test_what_is_said_of_a_number(options, message):
    with pytest.raises(ValueError) as refused:
        train_rl.check(change(train_rl.Config(), **options))
    assert str(refused.value) == message


@pytest.mark.parametrize(
    ("wanted", "inside", "outside"),
    [
        (Range(0, 1), (0, 0.5, 1), (-1e-9, 1.1)),
        (Range(0, 1, without="low"), (1e-9, 1), (0, 1.1)),
        (Range(0, 1, without="both"), (0.5,), (0, 1)),
    ],
)
def test_the_ends_of_a_range(wanted, inside, outside):
    assert all(wanted.holds(value) for value in inside)
    assert not any(wanted.holds(value) for value in (*outside, math.nan, math.inf))
