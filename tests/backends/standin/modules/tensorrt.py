"""The stand-in, as TensorRT."""

from standin import become

become(globals(), rtx=False)
