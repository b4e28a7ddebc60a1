"""What the operator of `model.onnx` computes."""

import numpy as np


def Swish(x, *, beta=1.0):
    return (x / (1 + np.exp(-beta * x))).astype(x.dtype)
