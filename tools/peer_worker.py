"""Quantize one ONNX model with one peer tool; runs in the peers' environment (see compare_peers.py).

    python peer_worker.py MODEL.onnx CALIB.npz TOOL METHOD OUT.onnx [--batch ROWS]

CALIB.npz holds one array per model input, first axis = rows. TOOL and METHOD:

    modelopt  max | entropy          NVIDIA ModelOpt's defaults, but the rest stays float32, not float16
    ort       minmax                 ONNX Runtime's quantize_static: Q/DQ, symmetric, per-channel weights,
                                     int32 biases (its default)
              minmax-float-bias      the same with float biases, the only ones TensorRT's parser accepts
              percentile-99.99       keeps every activation of every sample in memory

It knows nothing of trtq, so that its time and memory are the peer's alone.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from onnxruntime.quantization import CalibrationDataReader

Arrays = dict[str, np.ndarray]


class BatchReader(CalibrationDataReader):
    """Feeds the rows of `data` in consecutive equal batches of at most `batch` rows.

    ONNX Runtime's percentile calibrator fails on a shorter last batch.
    """

    def __init__(self, data: Arrays, batch: int) -> None:
        self.data = data
        self.rows = len(next(iter(data.values())))
        self.batch = next(size for size in range(batch, 0, -1) if self.rows % size == 0)
        self.rewind()

    def rewind(self) -> None:
        self._batches = self._iterate()

    def get_next(self) -> Arrays | None:
        return next(self._batches, None)

    def get_first(self) -> Arrays:
        """The first batch, without moving on (ModelOpt traces the graph with it)."""
        return next(self._iterate())

    def _iterate(self) -> Iterator[Arrays]:
        for start in range(0, self.rows, self.batch):
            yield {name: array[start : start + self.batch] for name, array in self.data.items()}


def quantize_modelopt(model: Path, data: Arrays, method: str, batch: int, out: Path) -> None:
    """ModelOpt's INT8 post-training quantization, calibrated on the CPU."""
    from modelopt.onnx.quantization import quantize

    with tempfile.TemporaryDirectory() as folder:  # ModelOpt leaves files beside the model it reads
        local = Path(folder, model.name)
        local.write_bytes(model.read_bytes())
        quantize(
            str(local),
            quantize_mode="int8",
            calibration_data_reader=BatchReader(data, batch),
            calibration_method=method,
            calibration_eps=["cpu"],
            high_precision_dtype="fp32",
            output_path=str(out),
            log_level="WARNING",
        )


def quantize_ort(model: Path, data: Arrays, method: str, batch: int, out: Path) -> None:
    """ONNX Runtime's static quantization with TensorRT's choices (symmetric, per-channel weights)."""
    from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    methods: dict[str, tuple[CalibrationMethod, dict[str, Any]]] = {
        "minmax": (CalibrationMethod.MinMax, {}),
        "minmax-float-bias": (CalibrationMethod.MinMax, {"QuantizeBias": False}),
        "percentile-99.99": (CalibrationMethod.Percentile, {"CalibPercentile": 99.99}),
    }
    calibrate, options = methods[method]
    with tempfile.TemporaryDirectory() as folder:
        prepared = Path(folder, "prepared.onnx")
        # Symbolic shape inference gives up on MiniLM.
        quant_pre_process(str(model), str(prepared), skip_symbolic_shape=True)
        quantize_static(
            str(prepared),
            str(out),
            BatchReader(data, batch),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            activation_type=QuantType.QInt8,
            weight_type=QuantType.QInt8,
            calibrate_method=calibrate,
            extra_options={"ActivationSymmetric": True, "WeightSymmetric": True, **options},
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("calib", type=Path)
    parser.add_argument("tool", choices=["modelopt", "ort"])
    parser.add_argument("method")
    parser.add_argument("out", type=Path)
    parser.add_argument("--batch", type=int, default=16, help="rows per calibration step (default 16)")
    arguments = parser.parse_args()
    with np.load(arguments.calib) as archive:
        data = dict(archive)
    quantize = {"modelopt": quantize_modelopt, "ort": quantize_ort}[arguments.tool]
    quantize(arguments.model, data, arguments.method, arguments.batch, arguments.out)


if __name__ == "__main__":
    main()
