"""Quantize one ONNX model with one peer tool; runs in the peers' environment (see compare_peers.py).

    python peer_worker.py MODEL.onnx CALIB.npz TOOL METHOD OUT.onnx [--batch ROWS]

CALIB.npz holds one array per model input, first axis = rows. TOOL and METHOD:

    modelopt  max | entropy          NVIDIA ModelOpt's defaults, but the rest stays float32, not float16
    ort       minmax                 ONNX Runtime's quantize_static: Q/DQ, symmetric, per-channel weights,
                                     int32 biases (its default)
              minmax-float-bias      the same with float biases, the only ones TensorRT's parser accepts
              percentile-99.99       keeps every activation of every sample in memory
    nncf      fast-bias              nncf.quantize on all rows, one by one: preset PERFORMANCE, symmetric, no
                                     overflow fix, the TRANSFORMER model type where there are MatMuls of two
                                     activations; fast bias correction (its default)
              accurate-bias          the same with fast_bias_correction=False
              unsigned               `fast-bias` with NNCF's own types: uint8 where nothing is negative, which
                                     TensorRT does not have. No option of NNCF asks for int8 there, so the
                                     others change its description of the hardware
    aimet     max | sqnr             AIMET-ONNX: QuantizationSimModel, schemes min_max and tf_enhanced, with
                                     quantizers in front of Conv, ConvTranspose, Gemm and MatMul (its default
                                     configuration has one behind every operator), to_onnx_qdq with signed
                                     activations and float biases
    quark     max | percentile       AMD Quark: Int8Spec, MinMax or Percentile (its default), weights per
                                     channel, only Conv, ConvTranspose, Gemm and MatMul, float biases
              cle                    Percentile and cross-layer equalization. Its bias correction needs biases
                                     that are quantized (0.13 fails with a KeyError without them)

It knows nothing of trtq, so that its time and memory are the peer's alone.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnxruntime.quantization import CalibrationDataReader

Arrays = dict[str, np.ndarray]

LAYERS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
MOVERS = ("Flatten", "Identity", "MaxPool", "Pad", "Reshape", "Slice", "Squeeze", "Transpose", "Unsqueeze")
"""Operators whose output holds values of their first input, and zeros."""


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
        self._batches = self.batches()

    def get_next(self) -> Arrays | None:
        return next(self._batches, None)

    def get_first(self) -> Arrays:
        """The first batch, without moving on (ModelOpt traces the graph with it)."""
        return next(self.batches())

    def batches(self) -> Iterator[Arrays]:
        """All batches, from the first."""
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


def quantize_nncf(model: Path, data: Arrays, method: str, batch: int, out: Path) -> None:
    """NNCF's post-training quantization; its statistics are of single rows, as it recommends."""
    import nncf
    from nncf.common.hardware import qspaces
    from nncf.quantization.advanced_parameters import (
        AdvancedQuantizationParameters,
        OverflowFix,
        QuantizationMode,
        QuantizationParameters,
    )

    if method != "unsigned":
        for activations in (qspaces.q8_a, qspaces.q8_a_sym, qspaces.q8_a_ch):
            object.__setattr__(activations, "signedness_to_force", True)
    graph = onnx.load(model)
    symmetric = {
        per_channel: QuantizationParameters(mode=QuantizationMode.SYMMETRIC, per_channel=per_channel)
        for per_channel in (False, True)
    }
    quantized = nncf.quantize(
        graph,
        nncf.Dataset(list(BatchReader(data, 1).batches())),
        preset=nncf.QuantizationPreset.PERFORMANCE,
        subset_size=len(next(iter(data.values()))),
        fast_bias_correction=method != "accurate-bias",
        model_type=nncf.ModelType.TRANSFORMER if multiplies_activations(graph.graph) else None,
        advanced_parameters=AdvancedQuantizationParameters(
            overflow_fix=OverflowFix.DISABLE,
            activations_quantization_params=symmetric[False],
            weights_quantization_params=symmetric[True],
        ),
    )
    onnx.save(quantized, out)


def multiplies_activations(graph: onnx.GraphProto) -> bool:
    """Whether some MatMul has no constant among its factors, as those of attention."""
    constants = {tensor.name for tensor in graph.initializer}
    constants |= {node.output[0] for node in graph.node if node.op_type == "Constant"}
    return any(node.op_type == "MatMul" and constants.isdisjoint(node.input) for node in graph.node)


def quantize_aimet(model: Path, data: Arrays, method: str, batch: int, out: Path) -> None:
    """AIMET-ONNX's simulator, calibrated and exported as Q/DQ."""
    from aimet_onnx.quantsim import QuantizationSimModel

    configuration = {
        "defaults": {
            "ops": {"is_output_quantized": "True", "is_symmetric": "True"},
            "params": {"is_quantized": "False", "is_symmetric": "True"},
            "strict_symmetric": "False",
            "unsigned_symmetric": "False",
            "per_channel_quantization": "False",
        },
        "params": {"weight": {"is_quantized": "True"}},
        "op_type": {name: {"per_channel_quantization": "True"} for name in LAYERS},
        "supergroups": [],
        "model_input": {"is_input_quantized": "True"},
        "model_output": {},
    }
    graph = onnx.load(model)
    makers = {name: node for node in graph.graph.node for name in node.output}
    factors = {name for node in graph.graph.node if node.op_type in LAYERS for name in node.input[:2]}
    for name in list(factors):  # AIMET has no quantizer behind an operator that only moves values
        while name in makers and makers[name].op_type in MOVERS:
            name = makers[name].input[0]
            factors.add(name)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "tensorrt.json")
        file.write_text(json.dumps(configuration))
        scheme = {"max": "min_max", "sqnr": "tf_enhanced"}[method]
        simulator = QuantizationSimModel(graph, quant_scheme=scheme, config_file=str(file))
        for tensor, quantizer in simulator.qc_quantize_op_dict.items():
            quantizer.enabled = tensor in factors
        simulator.compute_encodings(list(BatchReader(data, batch).batches()))
        quantized = simulator.to_onnx_qdq(force_activation_as="signed")
    onnx.save(quantized, out)


def quantize_quark(model: Path, data: Arrays, method: str, batch: int, out: Path) -> None:
    """AMD Quark's post-training quantization for ONNX."""
    from quark.onnx import CLEConfig, Int8Spec, ModelQuantizer, QConfig, QLayerConfig
    from quark.onnx.quantization.config.spec import CalibMethod, QuantGranularity

    calibration = CalibMethod.MinMax if method == "max" else CalibMethod.Percentile
    configuration = QConfig(
        QLayerConfig(
            activation=Int8Spec(calibration_method=calibration),
            weight=Int8Spec(
                calibration_method=CalibMethod.MinMax, quant_granularity=QuantGranularity.Channel
            ),
        ),
        algo_config=[CLEConfig()] if method == "cle" else [],
        OpTypesToQuantize=list(LAYERS),
        QuantizeBias=False,
    )
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):  # for its quantized_info.csv
        ModelQuantizer(configuration).quantize_model(str(model), str(out), BatchReader(data, batch))


TOOLS = {
    "modelopt": quantize_modelopt,
    "ort": quantize_ort,
    "nncf": quantize_nncf,
    "aimet": quantize_aimet,
    "quark": quantize_quark,
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("calib", type=Path)
    parser.add_argument("tool", choices=TOOLS)
    parser.add_argument("method")
    parser.add_argument("out", type=Path)
    parser.add_argument("--batch", type=int, default=16, help="rows per calibration step (default 16)")
    arguments = parser.parse_args()
    with np.load(arguments.calib) as archive:
        data = dict(archive)
    TOOLS[arguments.tool](
        arguments.model.absolute(), data, arguments.method, arguments.batch, arguments.out.absolute()
    )


if __name__ == "__main__":
    main()
