from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from trtq.simulation.kept import Kept

BATCHES = [
    {"y": np.arange(6, dtype=np.float32).reshape(2, 3).T, "mask": np.array([True, False])},
    {"y": np.full((1, 3), -2.5, np.float64), "mask": np.zeros((0, 4), np.bool_)},
    {"y": np.array(7, np.int64), "mask": np.array([[1, 2]], np.float16)},
]


@pytest.mark.parametrize("in_memory", [0, 30, 1 << 20])
def test_what_is_kept_comes_back(in_memory: int) -> None:
    kept = Kept(iter(BATCHES), in_memory)
    assert len(kept) == len(BATCHES)
    assert kept.nbytes == 24 + 2 + 24 + 0 + 8 + 4
    with ThreadPoolExecutor(4) as pool:
        every = list(pool.map(lambda _: kept[0:3], range(20)))
    for found in [*every, list(kept), [kept[-3], kept[-2], kept[-1]]]:
        for arrays, like in zip(found, BATCHES, strict=True):
            assert arrays.keys() == like.keys()
            for name, array in arrays.items():
                assert array.dtype == like[name].dtype
                np.testing.assert_array_equal(array, like[name])


def test_what_is_in_the_file_is_a_copy() -> None:
    array = np.zeros(4)
    kept = Kept([{"y": array}], 0)
    array[:] = 1
    kept[0]["y"][:] = 2
    assert not kept[0]["y"].any()
    with pytest.raises(IndexError):
        kept[1]
