"""trtq: INT8 deployment for TensorRT, from a trained ONNX model to an engine whose accuracy is proved."""

from importlib.metadata import version

__version__ = version("trtq")
