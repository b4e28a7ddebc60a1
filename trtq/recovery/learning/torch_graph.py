"""ONNX semantics over PyTorch: a float32 graph as a differentiable module.

Each operator is a small function of its attributes and inputs, in the registry `OPERATORS`. They follow the
ONNX specification for opsets from 13 on; a form of an operator that is not supported raises.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from trtq.errors import InputError
from trtq.graph.foreign import View
from trtq.graph.surgery import copied, in_order
from trtq.graph.weights import values_of

Attributes = Mapping[str, Any]
Operator = Callable[..., "Tensor | Sequence[Tensor]"]
"""(attributes, *inputs) -> the output, or all outputs; an input that is left out is None."""

OPERATORS: dict[str, Operator] = {}
"""ONNX operator -> function."""


class TorchGraph(torch.nn.Module):
    """A graph as a module. Its constants are buffers; `constant` gives one by its name.

    It ends in front of operators that ONNX does not define: what goes into them is then among its outputs.

    Args:
        graph: folded, float32; is not changed.

    Raises:
        InputError: an operator that `OPERATORS` lacks.
    """

    def __init__(self, graph: gs.Graph) -> None:
        super().__init__()
        graph = in_order(copied(graph))
        view = View.of(graph, references_too=False)
        self.nodes: list[gs.Node] = [node for node in graph.nodes if not view.hides(node)]
        for node in self.nodes:
            if node.op not in OPERATORS or node.domain not in (None, "", "ai.onnx"):
                raise InputError(
                    f"node '{node.name}' ({node.op}) has no PyTorch counterpart here",
                    cause="learning needs every operator's gradient",
                )
        for node in self.nodes:
            if node.op == "Split":  # opsets below 18 know it from the node alone
                node.attrs.setdefault("num_outputs", len(node.outputs))
        self.outputs: list[str] = list(view.outputs)
        constants = [t for t in graph.tensors().values() if isinstance(t, gs.Constant)]
        self._slots = {tensor.name: f"constant{i}" for i, tensor in enumerate(constants)}
        for tensor in constants:
            self.register_buffer(self._slots[tensor.name], _tensor(np.array(values_of(tensor))))
        self._last = {t.name: i for i, node in enumerate(self.nodes) for t in node.inputs}

    def constant(self, name: str) -> Tensor:
        """A constant of the graph."""
        value: Tensor = getattr(self, self._slots[name])
        return value

    def make_trainable(self, name: str) -> torch.nn.Parameter:
        """Turn a constant into a parameter."""
        parameter = torch.nn.Parameter(self.constant(name).clone())
        delattr(self, self._slots[name])
        setattr(self, self._slots[name], parameter)
        return parameter

    def operand(self, node: gs.Node, index: int, value: Tensor) -> Tensor:
        """What a node reads as its input `index`, whose tensor has this value: the value itself."""
        return value

    def forward(self, feeds: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The model's outputs.

        Args:
            feeds: model input -> tensor of the input's dtype.

        Raises:
            InputError: a node cannot be run; the message names it.
        """
        values = dict(feeds)
        for position, node in enumerate(self.nodes):
            inputs = [
                None
                if tensor.name == ""
                else self.operand(
                    node,
                    index,
                    self.constant(tensor.name) if tensor.name in self._slots else values[tensor.name],
                )
                for index, tensor in enumerate(node.inputs)
            ]
            try:
                outputs = OPERATORS[node.op](node.attrs, *inputs)
                made = [outputs] if isinstance(outputs, Tensor) else outputs
                missing = [t for t in node.outputs[len(made) :] if t.outputs or t.name in self.outputs]
                _require(not missing, f"output {len(made) + 1} of {node.op}")
            except Exception as error:  # whatever PyTorch raises for an unusual form of an operator
                raise InputError(
                    f"node '{node.name}' ({node.op}) cannot be run by PyTorch", cause=error
                ) from error
            values.update((tensor.name, value) for tensor, value in zip(node.outputs, made, strict=False))
            for tensor in node.inputs:
                if self._last[tensor.name] == position and tensor.name not in self.outputs:
                    values.pop(tensor.name, None)
        return {n: self.constant(n) if n in self._slots else values[n] for n in self.outputs}


def _register(*names: str) -> Callable[[Operator], Operator]:
    def add(function: Operator) -> Operator:
        OPERATORS.update(dict.fromkeys(names, function))
        return function

    return add


def _plain(**functions: Callable[..., Tensor]) -> None:
    """Operators without attributes."""
    for name, function in functions.items():
        OPERATORS[name] = lambda attributes, *inputs, _function=function: _function(*inputs)


def _require(condition: object, text: str) -> None:
    if not condition:
        raise NotImplementedError(text)


# --- element by element -------------------------------------------------------------------------------------


def _div(x: Tensor, y: Tensor) -> Tensor:
    return x / y if x.is_floating_point() else torch.div(x, y, rounding_mode="trunc")


def _fold(function: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Tensor]:
    """An operator of any number of inputs."""

    def variadic(first: Tensor, *others: Tensor) -> Tensor:
        for other in others:
            first = function(first, other)
        return first

    return variadic


_plain(
    Abs=torch.abs,
    Add=torch.add,
    And=torch.logical_and,
    Ceil=torch.ceil,
    Cos=torch.cos,
    Div=_div,
    Equal=torch.eq,
    Erf=torch.erf,
    Exp=torch.exp,
    Expand=lambda x, shape: x.expand(torch.broadcast_shapes(x.shape, tuple(shape.tolist()))),
    Floor=torch.floor,
    GlobalAveragePool=lambda x: x.mean(tuple(range(2, x.ndim)), keepdim=True),
    GlobalMaxPool=lambda x: x.amax(tuple(range(2, x.ndim)), keepdim=True),
    Greater=torch.gt,
    GreaterOrEqual=torch.ge,
    HardSwish=F.hardswish,
    IsNaN=torch.isnan,
    Identity=lambda x: x,
    Less=torch.lt,
    LessOrEqual=torch.le,
    Log=torch.log,
    MatMul=torch.matmul,
    Max=_fold(torch.maximum),
    Mean=lambda *x: _fold(torch.add)(*x) / len(x),
    Min=_fold(torch.minimum),
    Mish=F.mish,
    Mul=torch.mul,
    Neg=torch.neg,
    Not=torch.logical_not,
    Or=torch.logical_or,
    Pow=lambda x, y: torch.pow(x, y).to(x.dtype),
    PRelu=lambda x, slope: torch.where(x < 0, x * slope, x),
    Range=lambda start, limit, step: torch.arange(
        start.item(), limit.item(), step.item(), dtype=start.dtype, device=start.device
    ),
    Reciprocal=torch.reciprocal,
    Relu=F.relu,
    Round=torch.round,
    Sigmoid=torch.sigmoid,
    Sign=torch.sign,
    Sin=torch.sin,
    Softplus=lambda x: torch.logaddexp(x, torch.zeros_like(x)),
    Softsign=F.softsign,
    Sqrt=torch.sqrt,
    Sub=torch.sub,
    Sum=_fold(torch.add),
    Tanh=torch.tanh,
    Tile=lambda x, repeats: x.repeat(repeats.tolist()),
    Where=torch.where,
    Xor=torch.logical_xor,
)


@_register("Dropout")
def _dropout(
    a: Attributes, x: Tensor, ratio: Tensor | None = None, training: Tensor | None = None
) -> Sequence[Tensor]:
    """The input, and the mask of what was kept of it: everything."""
    _require(training is None or not training.item(), "Dropout in training mode")
    return x, torch.ones_like(x, dtype=torch.bool)


@_register("Clip")
def _clip(a: Attributes, x: Tensor, low: Tensor | None = None, high: Tensor | None = None) -> Tensor:
    bounds = [None if bound is None else bound.item() for bound in (low, high)]
    return x if bounds == [None, None] else torch.clamp(x, *bounds)


@_register("Elu")
def _elu(a: Attributes, x: Tensor) -> Tensor:
    return F.elu(x, a.get("alpha", 1.0))


@_register("Gelu")
def _gelu(a: Attributes, x: Tensor) -> Tensor:
    return F.gelu(x, approximate=a.get("approximate", "none"))


@_register("HardSigmoid")
def _hard_sigmoid(a: Attributes, x: Tensor) -> Tensor:
    return torch.clamp(a.get("alpha", 0.2) * x + a.get("beta", 0.5), 0, 1)


@_register("LeakyRelu")
def _leaky_relu(a: Attributes, x: Tensor) -> Tensor:
    return F.leaky_relu(x, a.get("alpha", 0.01))


@_register("Swish")
def _swish(a: Attributes, x: Tensor) -> Tensor:
    return x * torch.sigmoid(a.get("alpha", 1.0) * x)


@_register("Cast")
def _cast(a: Attributes, x: Tensor) -> Tensor:
    return x.to(_dtype(a["to"]))


@_register("CastLike")
def _cast_like(a: Attributes, x: Tensor, like: Tensor) -> Tensor:
    return x.to(like.dtype)


def _dtype(number: Any) -> torch.dtype:
    """The PyTorch dtype of an ONNX element type, or of the NumPy dtype that GraphSurgeon makes of it."""
    dtype = onnx.helper.tensor_dtype_to_np_dtype(number) if isinstance(number, int) else np.dtype(number)
    return _tensor(np.zeros(0, dtype)).dtype


def _tensor(values: NDArray) -> Tensor:
    """An array as a tensor; bfloat16, which NumPy lacks, by its bits."""
    if values.dtype.name == "bfloat16":
        return torch.from_numpy(values.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(values)


# --- linear -------------------------------------------------------------------------------------------------


@_register("Conv")
def _conv(a: Attributes, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    x, window = _padded(a, x, list(weight.shape[2:]))
    convolve = (F.conv1d, F.conv2d, F.conv3d)[x.ndim - 3]
    return convolve(x, weight, bias, window.strides, window.padding, window.dilations, a.get("group", 1))


@_register("ConvTranspose")
def _conv_transpose(a: Attributes, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    _require(
        a.get("auto_pad", "NOTSET") in ("NOTSET", "VALID") and "output_shape" not in a,
        "ConvTranspose with auto_pad or output_shape",
    )
    rank = x.ndim - 2
    pads = a.get("pads", [0] * 2 * rank)
    extra = a.get("output_padding", [0] * rank)
    convolve = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[rank - 1]
    strides, dilations = (a.get(name, [1] * rank) for name in ("strides", "dilations"))
    whole = convolve(x, weight, None, strides, 0, 0, a.get("group", 1), dilations)
    ends = [more - less for more, less in zip(extra, pads[rank:], strict=True)]
    y = _with_margins(whole, [-pad for pad in pads[:rank]] + ends)
    return y if bias is None else y + bias.reshape(-1, *[1] * rank)


@_register("Gemm")
def _gemm(a: Attributes, x: Tensor, y: Tensor, z: Tensor | None = None) -> Tensor:
    x, y = (t.mT if a.get(name, 0) else t for t, name in ((x, "transA"), (y, "transB")))
    alpha, beta = a.get("alpha", 1.0), a.get("beta", 1.0)
    product = x @ y if alpha == 1 else alpha * (x @ y)
    return product if z is None else product + (z if beta == 1 else beta * z)


@_register("Einsum")
def _einsum(a: Attributes, *inputs: Tensor) -> Tensor:
    return torch.einsum(a["equation"], *inputs)


# --- windows ------------------------------------------------------------------------------------------------


class _Window:
    """Strides, dilations and padding of a window that slides over the spatial axes.

    Attributes:
        pads: begin of each axis, then end of each, as in ONNX.
        padding: the begin of each where it equals the end, else 0: the input is then padded beforehand.
    """

    def __init__(self, a: Attributes, sizes: Sequence[int], kernel: Sequence[int]) -> None:
        rank = len(kernel)
        self.strides: list[int] = list(a.get("strides", [1] * rank))
        self.dilations: list[int] = list(a.get("dilations", [1] * rank))
        self.pads: list[int] = list(a.get("pads", [0] * 2 * rank))
        reach = [(k - 1) * d + 1 for k, d in zip(kernel, self.dilations, strict=True)]
        mode = a.get("auto_pad", "NOTSET")
        if mode.startswith("SAME"):
            total = [
                max((math.ceil(size / stride) - 1) * stride + r - size, 0)
                for size, stride, r in zip(sizes, self.strides, reach, strict=True)
            ]
            less, more = [t // 2 for t in total], [t - t // 2 for t in total]
            self.pads = [*less, *more] if mode == "SAME_UPPER" else [*more, *less]
        if a.get("ceil_mode", 0):
            for axis, (size, stride, r) in enumerate(zip(sizes, self.strides, reach, strict=True)):
                room = size + self.pads[axis] + self.pads[rank + axis] - r
                steps = math.ceil(room / stride)
                steps -= steps * stride >= size + self.pads[axis]  # a window may not start behind the input
                self.pads[rank + axis] += max(steps * stride - room, 0)
        self.symmetric = self.pads[:rank] == self.pads[rank:]
        self.padding = self.pads[:rank] if self.symmetric else [0] * rank


def _padded(a: Attributes, x: Tensor, kernel: Sequence[int], value: float = 0.0) -> tuple[Tensor, _Window]:
    """The input with the padding that PyTorch's function does not add itself, and the window."""
    window = _Window(a, x.shape[2:], kernel)
    return (x if window.symmetric else _with_margins(x, window.pads, value)), window


def _with_margins(x: Tensor, pads: Sequence[int], value: float = 0.0) -> Tensor:
    """Padded (or cropped, where negative) by ONNX's pads of the last axes."""
    rank = len(pads) // 2
    flat = [p for axis in reversed(range(rank)) for p in (pads[axis], pads[rank + axis])]
    return F.pad(x, flat, value=value) if any(flat) else x


@_register("AveragePool")
def _average_pool(a: Attributes, x: Tensor) -> Tensor:
    kernel = list(a["kernel_shape"])
    window = _Window(a, x.shape[2:], kernel)
    pool = (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)[x.ndim - 3]
    _require(all(d == 1 for d in window.dilations), "AveragePool with dilations")
    total = pool(_with_margins(x, window.pads), kernel, window.strides)
    if not any(window.pads):
        return total
    own = _Window({**a, "ceil_mode": 0}, x.shape[2:], kernel).pads if a.get("count_include_pad", 0) else None
    counted = torch.ones_like(x[:1, :1])
    if own is not None:
        counted = _with_margins(counted, own, 1.0)
        rest = [w - o for w, o in zip(window.pads, own, strict=True)]
    else:
        rest = window.pads
    return total / pool(_with_margins(counted, rest), kernel, window.strides)


@_register("MaxPool")
def _max_pool(a: Attributes, x: Tensor) -> Tensor:
    kernel = list(a["kernel_shape"])
    window = _Window(a, x.shape[2:], kernel)
    pool = (F.max_pool1d, F.max_pool2d, F.max_pool3d)[x.ndim - 3]
    lowest = -math.inf
    return pool(_with_margins(x, window.pads, lowest), kernel, window.strides, dilation=window.dilations)


# --- normalization and sums ---------------------------------------------------------------------------------


@_register("LayerNormalization")
def _layer_norm(a: Attributes, x: Tensor, gain: Tensor, bias: Tensor | None = None) -> Tensor:
    axis = a.get("axis", -1) % x.ndim
    shape = x.shape[axis:]
    gain = gain.expand(shape)
    return F.layer_norm(x, shape, gain, None if bias is None else bias.expand(shape), a.get("epsilon", 1e-5))


@_register("RMSNormalization")
def _rms_norm(a: Attributes, x: Tensor, gain: Tensor) -> Tensor:
    return F.rms_norm(x, x.shape[a.get("axis", -1) % x.ndim :], None, a.get("epsilon", 1e-5)) * gain


@_register("BatchNormalization")
def _batch_norm(a: Attributes, x: Tensor, gain: Tensor, bias: Tensor, mean: Tensor, var: Tensor) -> Tensor:
    _require(not a.get("training_mode", 0), "BatchNormalization in training mode")
    return F.batch_norm(x, mean, var, gain, bias, False, 0.0, a.get("epsilon", 1e-5))


@_register("InstanceNormalization")
def _instance_norm(a: Attributes, x: Tensor, gain: Tensor, bias: Tensor) -> Tensor:
    return F.group_norm(x, x.shape[1], gain, bias, a.get("epsilon", 1e-5))


@_register("GroupNormalization")
def _group_norm(a: Attributes, x: Tensor, gain: Tensor, bias: Tensor) -> Tensor:
    groups = a["num_groups"]
    each = x.shape[1] // gain.shape[0]  # before opset 21 there is one value for each group
    gain, bias = gain.repeat_interleave(each), bias.repeat_interleave(each)
    return F.group_norm(x, groups, gain, bias, a.get("epsilon", 1e-5))


@_register("Softmax")
def _softmax(a: Attributes, x: Tensor) -> Tensor:
    return F.softmax(x, a.get("axis", -1))


@_register("LogSoftmax")
def _log_softmax(a: Attributes, x: Tensor) -> Tensor:
    return F.log_softmax(x, a.get("axis", -1))


@_register("RotaryEmbedding")
def _rotary_embedding(
    a: Attributes, x: Tensor, cosine: Tensor, sine: Tensor, positions: Tensor | None = None
) -> Tensor:
    """x is (batch, heads, steps, size), or (batch, steps, heads * size)."""
    each = x if x.ndim == 4 else x.unflatten(2, (a["num_heads"], -1)).transpose(1, 2)
    size = a.get("rotary_embedding_dim", 0) or each.shape[-1]
    if positions is not None:
        cosine, sine = cosine[positions], sine[positions]
    cosine, sine = cosine.unsqueeze(1), sine.unsqueeze(1)
    turned, kept = each[..., :size], each[..., size:]
    interleaved = a.get("interleaved", 0)
    low, high = (turned[..., 0::2], turned[..., 1::2]) if interleaved else turned.chunk(2, -1)
    parts = cosine * low - sine * high, sine * low + cosine * high
    turned = torch.stack(parts, -1).flatten(-2) if interleaved else torch.cat(parts, -1)
    result = torch.cat([turned, kept], -1)
    return result if x.ndim == 4 else result.transpose(1, 2).flatten(2)


def _reduction(function: Callable[[Tensor, list[int], bool], Tensor]) -> Operator:
    def reduce(a: Attributes, x: Tensor, axes: Tensor | None = None) -> Tensor:
        chosen = _axes(a, axes)
        if not chosen:
            if a.get("noop_with_empty_axes", 0):
                return x
            chosen = list(range(x.ndim))
        return function(x, chosen, bool(a.get("keepdims", 1)))

    return reduce


def _axes(a: Attributes, axes: Tensor | None) -> list[int]:
    """The axes of an operator, which newer opsets give as an input; empty where they are left out.

    PyTorch's exporter may write a single one as a scalar.
    """
    return list(a.get("axes", [])) if axes is None else [int(axis) for axis in axes.reshape(-1).tolist()]


OPERATORS.update(
    ReduceL1=_reduction(lambda x, axes, keep: x.abs().sum(axes, keep)),
    ReduceL2=_reduction(lambda x, axes, keep: x.square().sum(axes, keep).sqrt()),
    ReduceMax=_reduction(lambda x, axes, keep: x.amax(axes, keep)),
    ReduceMean=_reduction(lambda x, axes, keep: x.mean(axes, keep)),
    ReduceMin=_reduction(lambda x, axes, keep: x.amin(axes, keep)),
    ReduceSum=_reduction(lambda x, axes, keep: x.sum(axes, keep)),
    ReduceSumSquare=_reduction(lambda x, axes, keep: x.square().sum(axes, keep)),
)


@_register("ArgMax")
def _arg_max(a: Attributes, x: Tensor) -> Tensor:
    axis, keep = a.get("axis", 0), bool(a.get("keepdims", 1))
    if a.get("select_last_index", 0):
        return x.shape[axis] - 1 - x.flip(axis).argmax(axis, keep)
    return x.argmax(axis, keep)


@_register("CumSum")
def _cum_sum(a: Attributes, x: Tensor, axis: Tensor) -> Tensor:
    dim = int(axis.item())
    x = x.flip(dim) if a.get("reverse", 0) else x
    total = x.cumsum(dim, dtype=x.dtype) - (x if a.get("exclusive", 0) else 0)
    return total.flip(dim) if a.get("reverse", 0) else total


# --- shapes and indices -------------------------------------------------------------------------------------


@_register("Shape")
def _shape(a: Attributes, x: Tensor) -> Tensor:
    return torch.tensor(x.shape[a.get("start", 0) : a.get("end", None)], dtype=torch.int64, device=x.device)


@_register("Size")
def _size(a: Attributes, x: Tensor) -> Tensor:
    return torch.tensor(x.numel(), device=x.device)


@_register("Constant")
def _constant(a: Attributes) -> Tensor:
    ((kind, value),) = a.items()
    if kind == "value":
        return torch.from_numpy(np.array(value.values))
    _require(kind in ("value_float", "value_floats", "value_int", "value_ints"), f"Constant with {kind}")
    return torch.tensor(value, dtype=torch.float32 if "float" in kind else torch.int64)


@_register("ConstantOfShape")
def _constant_of_shape(a: Attributes, shape: Tensor) -> Tensor:
    value = np.asarray(a["value"].values if "value" in a else np.zeros(1, np.float32)).reshape(())
    return torch.from_numpy(np.array(value)).to(shape.device).expand(shape.tolist()).clone()


@_register("Reshape")
def _reshape(a: Attributes, x: Tensor, shape: Tensor) -> Tensor:
    sizes = shape.tolist()
    if not a.get("allowzero", 0):
        sizes = [x.shape[i] if size == 0 else size for i, size in enumerate(sizes)]
    return x.reshape(sizes)


@_register("Flatten")
def _flatten(a: Attributes, x: Tensor) -> Tensor:
    axis = a.get("axis", 1)
    axis += x.ndim if axis < 0 else 0
    return x.reshape(math.prod(x.shape[:axis]), -1)


@_register("Transpose")
def _transpose(a: Attributes, x: Tensor) -> Tensor:
    return x.permute(a.get("perm", list(reversed(range(x.ndim)))))


@_register("Unsqueeze")
def _unsqueeze(a: Attributes, x: Tensor, axes: Tensor | None = None) -> Tensor:
    chosen = _axes(a, axes)
    rank = x.ndim + len(chosen)
    for axis in sorted(axis % rank for axis in chosen):
        x = x.unsqueeze(axis)
    return x


@_register("Squeeze")
def _squeeze(a: Attributes, x: Tensor, axes: Tensor | None = None) -> Tensor:
    return x.squeeze(tuple(_axes(a, axes) or range(x.ndim)))


@_register("Concat")
def _concat(a: Attributes, *inputs: Tensor) -> Tensor:
    return torch.cat(inputs, a["axis"])


@_register("Split")
def _split(a: Attributes, x: Tensor, sizes: Tensor | None = None) -> Sequence[Tensor]:
    axis = a.get("axis", 0)
    if sizes is not None:
        return torch.split(x, sizes.tolist(), axis)
    return torch.split(x, math.ceil(x.shape[axis] / a["num_outputs"]), axis)


@_register("Slice")
def _slice(
    a: Attributes,
    x: Tensor,
    starts: Tensor,
    ends: Tensor,
    axes: Tensor | None = None,
    steps: Tensor | None = None,
) -> Tensor:
    count = len(starts)
    chosen = range(count) if axes is None else axes.tolist()
    strides = [1] * count if steps is None else steps.tolist()
    for axis, start, end, step in zip(chosen, starts.tolist(), ends.tolist(), strides, strict=True):
        size = x.shape[axis]
        if step > 0:
            index: list[slice] = [slice(None)] * x.ndim
            index[axis] = slice(*slice(start, end).indices(size)[:2], step)
            x = x[tuple(index)]
        else:
            end = None if end < -size else end
            kept = list(range(size))[slice(start, end, step)]
            x = x.index_select(axis, torch.tensor(kept, dtype=torch.int64, device=x.device))
    return x


@_register("Gather")
def _gather(a: Attributes, x: Tensor, indices: Tensor) -> Tensor:
    axis = a.get("axis", 0) % x.ndim
    flat = _from_start(indices, x.shape[axis]).flatten()
    return x.index_select(axis, flat).reshape([*x.shape[:axis], *indices.shape, *x.shape[axis + 1 :]])


@_register("GatherElements")
def _gather_elements(a: Attributes, x: Tensor, indices: Tensor) -> Tensor:
    axis = a.get("axis", 0)
    indices = _from_start(indices, x.shape[axis])
    kept = [slice(None) if i == axis % x.ndim else slice(n) for i, n in enumerate(indices.shape)]
    return torch.gather(x[tuple(kept)], axis, indices)


@_register("GatherND")
def _gather_nd(a: Attributes, x: Tensor, indices: Tensor) -> Tensor:
    _require(not a.get("batch_dims", 0), "GatherND with batch_dims")
    return x[tuple(_from_start(indices[..., i], x.shape[i]) for i in range(indices.shape[-1]))]


def _from_start(indices: Tensor, size: int) -> Tensor:
    """Indices of which negative ones count from the end."""
    return torch.where(indices < 0, indices + size, indices).long()


@_register("Pad")
def _pad(
    a: Attributes, x: Tensor, pads: Tensor, value: Tensor | None = None, axes: Tensor | None = None
) -> Tensor:
    chosen = list(range(x.ndim)) if axes is None else [axis % x.ndim for axis in axes.tolist()]
    begin, end = pads.tolist()[: len(chosen)], pads.tolist()[len(chosen) :]
    mode = a.get("mode", "constant")
    if mode == "constant":
        every = [0] * 2 * x.ndim
        for axis, before, after in zip(chosen, begin, end, strict=True):
            every[axis], every[x.ndim + axis] = before, after
        return _with_margins(x, every, 0.0 if value is None else value.item())
    for axis, before, after in zip(chosen, begin, end, strict=True):
        last = x.shape[axis] - 1
        at = torch.arange(-before, last + 1 + after, device=x.device)
        if mode == "edge":
            at = at.clamp(0, last)
        elif mode == "reflect":
            at = last - (last - at.abs()).abs()
        else:
            at = at % (last + 1)
        x = x.index_select(axis, at)
    return x


@_register("DepthToSpace")
def _depth_to_space(a: Attributes, x: Tensor) -> Tensor:
    n, c, h, w = x.shape
    b = a["blocksize"]
    if a.get("mode", "DCR") == "DCR":
        moved = x.reshape(n, b, b, c // b**2, h, w).permute(0, 3, 4, 1, 5, 2)
    else:
        moved = x.reshape(n, c // b**2, b, b, h, w).permute(0, 1, 4, 2, 5, 3)
    return moved.reshape(n, c // b**2, h * b, w * b)


@_register("SpaceToDepth")
def _space_to_depth(a: Attributes, x: Tensor) -> Tensor:
    n, c, h, w = x.shape
    b = a["blocksize"]
    order = (0, 3, 5, 1, 2, 4) if a.get("mode", "DCR") == "DCR" else (0, 1, 3, 5, 2, 4)
    blocks = x.reshape(n, c, h // b, b, w // b, b)
    return blocks.permute(order).reshape(n, c * b**2, h // b, w // b)


@_register("Trilu")
def _trilu(a: Attributes, x: Tensor, k: Tensor | None = None) -> Tensor:
    triangle: Any = torch.triu if a.get("upper", 1) else torch.tril
    part: Tensor = triangle(x, 0 if k is None else int(k.item()))
    return part


@_register("Upsample")
def _upsample(a: Attributes, x: Tensor, scales: Tensor) -> Tensor | Sequence[Tensor]:
    """Resize of opsets below 10."""
    positions = {"coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}
    return _resize({**a, **positions}, x, None, scales)


@_register("Resize")
def _resize(
    a: Attributes,
    x: Tensor,
    roi: Tensor | None = None,
    scales: Tensor | None = None,
    sizes: Tensor | None = None,
) -> Tensor:
    """Axis by axis: every position of the output takes its nearest neighbour, or a mean of two."""
    mode = a.get("mode", "nearest")
    _require(mode in ("nearest", "linear") and not a.get("antialias", 0), f"Resize '{mode}' or antialiased")
    _require(a.get("keep_aspect_ratio_policy", "stretch") == "stretch", "Resize that keeps the aspect ratio")
    given = scales if scales is not None and scales.numel() else sizes
    assert given is not None
    axes = list(a.get("axes", range(x.ndim)))
    for axis, value in zip(axes, given.tolist(), strict=True):
        size = x.shape[axis]
        wanted = math.floor(size * value) if given is scales else value
        factor = value if given is scales else wanted / size
        if wanted == size and factor == 1:
            continue
        at = _source_positions(a, size, wanted, factor).to(x.device)
        if mode == "nearest":
            x = x.index_select(axis, _nearest(a, at).clamp(0, size - 1))
            continue
        at = at.clamp(0, size - 1)
        low = at.floor().long()
        share = (at - low).to(x.dtype).reshape([-1 if i == axis % x.ndim else 1 for i in range(x.ndim)])
        below, above = x.index_select(axis, low), x.index_select(axis, (low + 1).clamp(max=size - 1))
        x = below * (1 - share) + above * share
    return x


def _source_positions(a: Attributes, size: int, wanted: int, factor: float) -> Tensor:
    """Where the positions of a resized axis are on the original one; float32, as in ONNX Runtime."""
    at = torch.arange(wanted, dtype=torch.float32)
    mode = a.get("coordinate_transformation_mode", "half_pixel")
    if mode == "asymmetric":
        return at / factor
    if mode == "align_corners":
        return at * (size - 1) / (wanted - 1) if wanted > 1 else torch.zeros_like(at)
    if mode == "pytorch_half_pixel" and wanted == 1:
        return torch.zeros_like(at)
    _require(mode.endswith("half_pixel") or mode == "half_pixel_symmetric", f"Resize with {mode} coordinates")
    at = (at + 0.5) / factor - 0.5
    if mode == "half_pixel_symmetric":  # what rounding the output's size cut off is shared by both ends
        at += size / 2 * (1 - wanted / (factor * size))
    return at


def _nearest(a: Attributes, at: Tensor) -> Tensor:
    rounding = a.get("nearest_mode", "round_prefer_floor")
    whole = {
        "floor": torch.floor,
        "ceil": torch.ceil,
        "round_prefer_floor": lambda at: torch.ceil(at - 0.5),
        "round_prefer_ceil": lambda at: torch.floor(at + 0.5),
    }[rounding](at)
    return whole.long()


# --- recurrent ----------------------------------------------------------------------------------------------


@_register("LSTM")
def _lstm(
    a: Attributes,
    x: Tensor,
    weight: Tensor,
    recurrence: Tensor,
    bias: Tensor | None = None,
    lengths: Tensor | None = None,
    hidden: Tensor | None = None,
    cell: Tensor | None = None,
    peepholes: Tensor | None = None,
) -> Sequence[Tensor]:
    _require(lengths is None and peepholes is None, "LSTM with lengths or peepholes")

    def step(x: Tensor, state: list[Tensor], r: Tensor, b: Tensor) -> list[Tensor]:
        i, o, f, c = (x + state[0] @ r.mT + b).chunk(4, -1)
        cell = torch.sigmoid(f) * state[1] + torch.sigmoid(i) * torch.tanh(c)
        return [torch.sigmoid(o) * torch.tanh(cell), cell]

    return _recurrent(a, x, weight, recurrence, bias, [hidden, cell], step)


@_register("GRU")
def _gru(
    a: Attributes,
    x: Tensor,
    weight: Tensor,
    recurrence: Tensor,
    bias: Tensor | None = None,
    lengths: Tensor | None = None,
    hidden: Tensor | None = None,
) -> Sequence[Tensor]:
    _require(lengths is None, "GRU with lengths")

    def step(x: Tensor, state: list[Tensor], r: Tensor, b: Tensor) -> list[Tensor]:
        size = r.shape[-1]
        (xz, xr, xh), (rz, rr, rh), (bz, br, bh) = x.chunk(3, -1), r.split(size), b.chunk(3, -1)
        (h,) = state
        z, reset = torch.sigmoid(xz + h @ rz.mT + bz), torch.sigmoid(xr + h @ rr.mT + br)
        if a.get("linear_before_reset", 0):
            new = torch.tanh(xh + reset * (h @ rh.mT + bh))
        else:
            new = torch.tanh(xh + (reset * h) @ rh.mT + bh)
        return [(1 - z) * new + z * h]

    return _recurrent(a, x, weight, recurrence, bias, [hidden], step)


def _recurrent(
    a: Attributes,
    x: Tensor,
    weight: Tensor,
    recurrence: Tensor,
    bias: Tensor | None,
    initial: list[Tensor | None],
    step: Callable[[Tensor, list[Tensor], Tensor, Tensor], list[Tensor]],
) -> Sequence[Tensor]:
    """Y (length, directions, batch, hidden) and the last states, (directions, batch, hidden) each.

    Args:
        step: (inputs times weights + their bias, states, recurrent weights, recurrent bias) -> states.
    """
    _require(
        not {"activations", "clip"} & a.keys() and not a.get("layout", 0) and not a.get("input_forget", 0),
        "unusual recurrent attributes",
    )
    directions, size = recurrence.shape[0], recurrence.shape[-1]
    length, batch, _ = x.shape
    outputs, lasts = [], []
    for d in range(directions):
        backward = a.get("direction", "forward") == "reverse" or d == 1
        both = recurrence.new_zeros(2 * recurrence.shape[1]) if bias is None else bias[d]
        input_bias, recurrent_bias = both.chunk(2)
        state = [x.new_zeros(batch, size) if start is None else start[d] for start in initial]
        scaled = x @ weight[d].mT + input_bias
        made = []
        for t in reversed(range(length)) if backward else range(length):
            state = step(scaled[t], state, recurrence[d], recurrent_bias)
            made.append(state[0])
        outputs.append(torch.stack(made[::-1] if backward else made))
        lasts.append(state)
    return torch.stack(outputs, 1), *(torch.stack(states) for states in zip(*lasts, strict=True))
