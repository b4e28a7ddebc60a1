"""Optimization profiles, and finding the GPU."""

from __future__ import annotations

import pickle
import subprocess

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trtq.backends.interface import (
    Range,
    ValuedProfile,
    find_gpu,
    held_values,
    parse_profile,
    profiles_from,
    several_profiles,
    value_range,
)
from trtq.errors import InputError


def test_static_model_needs_no_profile() -> None:
    assert profiles_from({"x": (1, 3, 4, 4)}, {}) == {}


def test_batch_axis() -> None:
    expected = {"x": Range((1, 3, 4), (8, 3, 4), (32, 3, 4))}
    assert profiles_from({"x": ("N", 3, 4)}, {"x": [(3, 4)]}) == expected
    assert profiles_from({"x": (None, 3, 4)}, {}) == expected
    assert profiles_from({"x": ("", 3)}, {}, batch=2) == {"x": Range((1, 3), (2, 3), (8, 3))}
    assert profiles_from({"x": ("N",)}, {}, batch=2) == {"x": Range((1,), (2,), (8,))}


def test_other_axes_follow_the_data() -> None:
    rows = [(20,), (64,), (64,), (100,)]
    assert profiles_from({"x": ("N", "L")}, {"x": rows}) == {"x": Range((1, 20), (8, 64), (32, 100))}
    assert profiles_from({"x": (4, "L")}, {"x": rows}) == {"x": Range((4, 20), (4, 64), (4, 100))}


def test_the_most_frequent_row_is_tuned_for() -> None:
    def opt(rows: list[tuple[int, ...]]) -> tuple[int, ...]:
        return profiles_from({"x": ("N", *"LM"[: len(rows[0])])}, {"x": rows})["x"].opt[1:]

    assert opt([(20,), (64,), (64,), (100,)]) == (64,)
    assert opt([(20,), (20,), (64,), (100,)]) == (20,)
    assert opt([(5,), (7,), (900,)]) == (7,)  # none is frequent: the middle one
    assert opt([(2, 9), (2, 9), (4, 8), (4, 3), (4, 2)]) == (2, 9)  # (4, 9) was never seen


def test_all_inputs_are_tuned_for_one_row() -> None:
    inputs = {"ids": ("N", "L"), "pairs": ("N", "L", "K"), "flag": ("N", 1)}
    rows = {
        "ids": [(8,), (8,), (8,), (6,), (6,)],
        "pairs": [(8, 1), (8, 2), (8, 3), (6, 4), (6, 4)],
        "flag": [(1,)] * 5,
    }
    found = profiles_from(inputs, rows)
    assert {name: sizes.opt for name, sizes in found.items()} == {
        "ids": (8, 6),
        "pairs": (8, 6, 4),
        "flag": (8, 1),
    }
    assert (found["pairs"].min, found["pairs"].max) == ((1, 6, 1), (32, 8, 4))


def test_other_rows_widen_the_profile_only() -> None:
    rows, others = {"x": [(20,), (30,), (30,)]}, {"x": [(10,), (99,), (99,), (99,)]}
    assert profiles_from({"x": ("N", "L")}, rows, also=others) == {"x": Range((1, 10), (8, 30), (32, 99))}
    assert profiles_from({"x": ("N", "L")}, {}, also=others) == {"x": Range((1, 10), (8, 99), (32, 99))}
    with pytest.raises(InputError, match="2 axes"):
        profiles_from({"x": ("N", "L")}, rows, also={"x": [(3, 4)]})


def test_several_profiles() -> None:
    small, large, mask = (Range(*[shape] * 3) for shape in [(1, 8), (1, 64), (1, 1)])
    assert several_profiles([]) == ()
    assert several_profiles([("x", small), ("m", mask)]) == ({"x": small, "m": mask},)
    assert several_profiles([("x", small), ("m", mask), ("x", large)]) == (
        {"x": small, "m": mask},
        {"x": large, "m": mask},
    )
    with pytest.raises(InputError, match="'x' has 2, 'm' has 3"):
        several_profiles([("x", small), ("x", large), ("m", mask), ("m", mask), ("m", mask)])
    with pytest.raises(InputError, match="two ranges for 'x'"):
        parse_profile(["x:1x8", "x:1x64"])


def test_profile_problems_are_said() -> None:
    with pytest.raises(InputError, match="no data"):
        profiles_from({"x": ("N", "L")}, {})
    with pytest.raises(InputError, match="2 axes"):
        profiles_from({"x": ("N", "L")}, {"x": [(3, 4)]})
    with pytest.raises(InputError, match="at least 1"):
        profiles_from({"x": ("N", 3)}, {}, batch=0)


def test_parse_profile() -> None:
    texts = ["input:1x3x8,8x3x8,32x3x9", "a:0:4x2"]
    assert parse_profile(texts) == {
        "input": Range((1, 3, 8), (8, 3, 8), (32, 3, 9)),
        "a:0": Range((4, 2), (4, 2), (4, 2)),
    }


@pytest.mark.parametrize(
    "text", ["", "x", "x:", ":1x2", "x:1x2,3x4", "x:1xN", "x:1x2,2x2,1x2", "x:1,1x2,1x2"]
)
def test_bad_profiles_are_refused(text: str) -> None:
    with pytest.raises(InputError, match="not an optimization profile"):
        parse_profile([text])


shapes = st.lists(st.integers(1, 99), min_size=1, max_size=4)


@given(st.text(min_size=1), shapes)
def test_every_name_can_be_written(name: str, shape: list[int]) -> None:
    text = "x".join(map(str, shape))
    assert parse_profile([f"{name}:{text}"]) == {name: Range(*[tuple(shape)] * 3)}


def test_values_range_number_by_number() -> None:
    """The most frequent ones belong together; of equally frequent ones it is those in the middle."""
    seen = [(480, 640), (640, 480), (480, 640), (100, 900)]
    assert value_range(seen) == Range((100, 480), (480, 640), (640, 900))
    assert value_range(seen, [(32, 1000)]) == Range((32, 480), (480, 640), (640, 1000))
    assert value_range([(3,), (5,), (9,)]) == Range((3,), (5,), (9,))
    assert value_range([(-1, 0), (0, 0), (4, 0)]).opt in {(-1, 0), (0, 0), (4, 0)}


def test_a_profile_that_knows_what_inputs_hold_is_one_of_shapes() -> None:
    shapes, held = {"x": Range((1, 3), (8, 3), (32, 3))}, {"size": Range((1, 1), (2, 2), (3, 3))}
    profile = ValuedProfile(shapes, held)
    assert profile == shapes
    assert held_values(pickle.loads(pickle.dumps(profile))) == held
    assert held_values(shapes) == {}


def test_a_gpu_that_is_hidden_is_none() -> None:
    assert find_gpu() is None


@pytest.mark.gpu
def test_gpu_as_the_driver_reports_it() -> None:
    query = ["nvidia-smi", "--query-gpu=name,compute_cap,driver_version", "--format=csv,noheader", "--id=0"]
    reported = subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip()
    gpu = find_gpu()
    assert gpu is not None
    assert f"{gpu.name}, {gpu.compute_capability}, {gpu.driver}" == reported
