"""The stand-in, as TensorRT for RTX."""

from standin import become

become(globals(), rtx=True)
