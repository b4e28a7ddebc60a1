"""Every name of TensorRT's API that `trtq` uses, looked up in NVIDIA's own bindings.

Run by tests/backends/test_tensorrt.py, once for each version. What a version lacks must be exactly what
`Dialect` keeps `trtq` from using there.
"""

from __future__ import annotations

import pytest
import tensorrt_bindings as trt
from runner_api import exists, used_names

from trtq.backends.dialect import dialect_of
from trtq.backends.network import logger, started
from trtq.errors import MissingBackendError

MAJOR = int(trt.__version__.split(".")[0])
MODULES = ("network.py", "tensorrt.py", "inner.py")
CLASSES = {
    "builder": "Builder",
    "config": "IBuilderConfig",
    "network": "INetworkDefinition",
    "layer": "ILayer",
    "constant": "IConstantLayer",
    "output": "ITensor",
    "tensor": "ITensor",
    "result": "IOptimizationProfile",
    "parser": "OnnxParser",
    "error": "ParserError",
    "runtime": "Runtime",
    "engine": "ICudaEngine",
    "runtime_config": "IRuntimeConfig",
    "context": "IExecutionContext",
    "inspector": "EngineInspector",
}
"""Name of a variable in those modules -> the class it is of."""

RTX_ONLY = {
    "ICudaEngine.create_runtime_config",
    "DynamicShapesKernelSpecializationStrategy",
    "DynamicShapesKernelSpecializationStrategy.EAGER",
    "IRuntimeConfig.dynamic_shapes_kernel_specialization_strategy",
}
MISSING = {
    8: {
        "NetworkDefinitionCreationFlag.STRONGLY_TYPED",
        "BuilderFlag.STRIP_PLAN",
        "IBuilderConfig.progress_monitor",
        "ParserError.node_name",
        "ParserError.node_operator",
    },
    10: set(),
    11: {
        "NetworkDefinitionCreationFlag.EXPLICIT_BATCH",
        "BuilderFlag.INT8",
        "BuilderFlag.OBEY_PRECISION_CONSTRAINTS",
        "IBuilderConfig.int8_calibrator",
        "IBuilderConfig.set_calibration_profile",
        "ILayer.precision",
        "ILayer.set_output_type",
    },
}


def test_only_what_the_dialect_excludes_is_missing() -> None:
    names = (
        used_names(MODULES, CLASSES) - RTX_ONLY - {"ParserError.strerror"}
    )  # `error` is an OSError elsewhere
    assert len(names) > 50  # the search itself works
    assert {name for name in names if not exists(trt, name)} == MISSING[MAJOR]


def test_dialect() -> None:
    dialect = dialect_of(trt)
    assert dialect.name == {8: "TensorRT 8.6", 10: "TensorRT 10", 11: "TensorRT 11"}[MAJOR]
    assert dialect.weak_typing == hasattr(trt, "IInt8Calibrator") == hasattr(trt.BuilderFlag, "FP16")
    flags = trt.NetworkDefinitionCreationFlag
    assert dialect.strong_typing == hasattr(flags, "STRONGLY_TYPED")
    assert dialect.named_parser_errors == hasattr(trt.ParserError, "node_name")
    assert all(hasattr(trt.BuilderFlag, flag) for flag in dialect.flags)
    assert ("BF16" in dialect.flags) == hasattr(trt.BuilderFlag, "BF16")
    assert ("strip_weights" in dialect.options) == hasattr(trt.BuilderFlag, "STRIP_PLAN")
    if dialect.explicit_batch:
        assert hasattr(flags, "EXPLICIT_BATCH")


def test_a_library_that_does_not_start_is_said() -> None:
    """The runtime here is a null pointer, as NVIDIA's is without a driver."""
    with pytest.raises(MissingBackendError, match="does not start"):
        started(trt.Runtime, logger(trt))


def test_logger_is_one_of_nvidias() -> None:
    log = logger(trt)
    assert isinstance(log, trt.ILogger)
    severity = trt.ILogger.Severity
    log.log(severity.ERROR, "broken")
    log.log(severity.WARNING, "careful ")
    log.log(severity.VERBOSE, "Layers:\nName: x")
    assert (log.errors, log.warnings, log.layers) == (["broken"], ["careful"], "Layers:\nName: x")
