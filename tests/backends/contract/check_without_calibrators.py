"""TensorRT 11's own bindings: no calibrators, and a message that says what to do instead.

Run by tests/backends/test_calibrators.py.
"""

from __future__ import annotations

import numpy as np
import pytest
import tensorrt_bindings as trt

from trtq.backends.calibrators import BASES, table_calibrator
from trtq.calibration.table import Table
from trtq.errors import MissingBackendError


def test_there_are_no_calibrators() -> None:
    assert trt.__version__.startswith("11.")
    assert not any(hasattr(trt, name) for name in [*BASES.values(), "IInt8Calibrator"])


@pytest.mark.parametrize("algorithm", BASES)
def test_the_error_names_version_and_remedy(algorithm: str) -> None:
    with pytest.raises(MissingBackendError) as caught:
        table_calibrator(trt, Table({"x": np.float32(0.5)}, algorithm=algorithm))
    assert caught.value.problem == f"TensorRT {trt.__version__} has no calibrators"
    assert "trtq migrate" in str(caught.value.remedy)
