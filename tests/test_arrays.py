"""Arrays of `.npz` files, against NumPy's own reader."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hostile.inputs import npy, npz
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from trtq.arrays import MOST_WHOLE, check_whole, members, read_arrays

TYPES = st.one_of(
    hnp.boolean_dtypes(), hnp.integer_dtypes(), hnp.floating_dtypes(), hnp.unicode_string_dtypes()
)


@given(
    st.dictionaries(st.text("abc", min_size=1), hnp.arrays(TYPES, hnp.array_shapes(min_dims=0)), max_size=3),
    st.booleans(),
)
def test_arrays_are_numpys(arrays: dict[str, np.ndarray], compressed: bool) -> None:
    buffer = io.BytesIO()
    (np.savez_compressed if compressed else np.savez)(buffer, **{f"_{name}": a for name, a in arrays.items()})
    found = read_arrays(buffer.getvalue())
    with np.load(io.BytesIO(buffer.getvalue())) as expected:
        assert list(found) == expected.files
        for name, array in found.items():
            assert array.dtype == expected[name].dtype
            np.testing.assert_array_equal(array, expected[name])


@given(st.integers(-3, 20), st.integers(-3, 20), st.integers(0, 100), st.sampled_from([0, 8]))
def test_a_header_that_its_bytes_do_not_bear_out(rows: int, columns: int, had: int, method: int) -> None:
    content = npz({"x.npy": npy(f"({rows}, {columns})", bytes(4 * had))}, method)
    if rows >= 0 and columns >= 0 and rows * columns == had:
        assert read_arrays(content)["x"].shape == (rows, columns)
    else:
        with pytest.raises(ValueError, match="array 'x' has"):
            read_arrays(content)


def test_columns_first_is_read_as_it_was(tmp_path: Path) -> None:
    array = np.asfortranarray(np.arange(6).reshape(2, 3))
    np.savez(tmp_path / "a.npz", x=array)
    np.testing.assert_array_equal(read_arrays(tmp_path / "a.npz")["x"], array)


def test_what_is_read_whole_has_a_limit() -> None:
    with zipfile.ZipFile(
        io.BytesIO(npz({"x.npy": npy("(2,)", bytes(8)), "y.npy": npy("()", bytes(4))}))
    ) as archive:
        found = members(archive)
        check_whole(found)
        found[0].info.file_size = MOST_WHOLE
        with pytest.raises(ValueError, match="would have to be read whole"):
            check_whole(found)
