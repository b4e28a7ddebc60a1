"""Random small ONNX models by seed: shape arithmetic, casts, integers, float chains and weighted layers.

They grow node by node; ONNX's reference implementation runs each new node, so every model is valid, its
values are finite and small, and what it gives is known without the code under test.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper
from onnx.reference import ReferenceEvaluator

OPSETS = range(11, 24)

SUFFIXES = (
    "/scale",
    "/zero_point",
    "/quantized",
    "/dequantized",
    "/0/scale",
    "/0/int8",
    "/1/int8",
    "/float16",
    "/QuantizeLinear",
    "/DequantizeLinear",
    "/float16/Cast",
    "/Cast",
    "/bias",
    "/input_1",
    "/input_2",
    "/folded_weight",
    "/folded_bias",
    "/left",
    "/right_transposed",
    "/product",
    "/Identity",
    "/twin",
    "/error",
    "/error/mean",
    "_1",
    "/scale_1",
)
"""What passes put behind the names that they find."""

LARGEST = 4096  # elements of any tensor


@dataclass(frozen=True)
class RandomModel:
    """A model, what to feed it, and what ONNX's reference implementation makes of that."""

    proto: onnx.ModelProto
    feed: dict[str, NDArray]

    def outputs(self, proto: onnx.ModelProto | None = None) -> dict[str, NDArray]:
        """The outputs of the model, or of what a pass made of it, by the reference implementation."""
        model = self.proto if proto is None else proto
        names = [output.name for output in self.proto.graph.output]
        results = ReferenceEvaluator(model).run(names, self.feed)
        return {name: np.asarray(value) for name, value in zip(names, results, strict=True)}


def random_model(seed: int, *, colliding: bool = False, nodes: int = 14) -> RandomModel:
    """The model of a seed.

    Args:
        colliding: names are such as passes make up (`SUFFIXES`), and nodes share names or have none; nothing
            else of the model depends on it.
        nodes: about how many.
    """
    builder = _Builder(seed, colliding)
    while len(builder.nodes) < nodes:
        builder.grow()
    return builder.finished()


class _Builder:
    def __init__(self, seed: int, colliding: bool) -> None:
        self.random = np.random.default_rng(seed)
        self._naming = np.random.default_rng((seed, 1)) if colliding else None
        self.opset = int(self.random.choice(OPSETS))
        self.nodes: list[onnx.NodeProto] = []
        self.values: dict[str, NDArray] = {}
        self._constants: list[onnx.TensorProto] = []
        self._inner: set[str] = set()
        shape = [int(d) for d in self.random.integers((1, 2, 3, 3), (4, 5, 7, 7))]
        self._x = self._name()
        self.values[self._x] = self.random.normal(size=shape).astype(np.float32)
        self._declared = [d if self.random.random() < 0.4 else f"D{i}" for i, d in enumerate(shape)]

    # -- names

    def _name(self) -> str:
        plain = f"t{len(self.values) + len(self._inner)}"
        if self._naming is None or self._naming.random() < 0.3:
            return plain if plain not in self.values else f"{plain}_"
        bases = [*self.values, *(f"n{i}" for i in range(8)), *(f"t{i}" for i in range(len(self.values) + 4))]
        while True:
            name = f"{self._naming.choice(bases)}{self._naming.choice(SUFFIXES)}"
            if name not in self.values and name not in self._inner:
                return name

    def _inner_name(self) -> str:
        """A name inside a body."""
        name = self._name()
        self._inner.add(name)
        return name

    def _node_name(self) -> str:
        if self._naming is None or self._naming.random() < 0.3:
            return f"n{len(self.nodes)}"
        known = [node.name for node in self.nodes if node.name]
        if known and self._naming.random() < 0.1:
            return str(self._naming.choice(known))
        if self._naming.random() < 0.1:
            return ""
        return f"{self._naming.choice([*self.values, *known])}{self._naming.choice(SUFFIXES)}"

    # -- parts

    def constant(self, values: Any, dtype: Any = None) -> str:
        """An initializer, or the output of a Constant."""
        array, name = np.asarray(values, dtype), self._name()
        if self.random.random() < 0.6:
            self._constants.append(numpy_helper.from_array(array, name))
        else:
            self.nodes.append(self._constant_node(array, name))
        self.values[name] = array
        return name

    def _constant_node(self, array: NDArray, name: str) -> onnx.NodeProto:
        node, form = self._node_name(), self.random.random()
        if self.opset >= 12 and form < 0.5 and array.ndim < 2 and array.dtype in (np.float32, np.int64):
            kind = "float" if array.dtype == np.float32 else "int"
            attribute = f"value_{kind}{'s' if array.ndim else ''}"
            return helper.make_node("Constant", [], [name], node, **{attribute: array.tolist()})
        return helper.make_node("Constant", [], [name], node, value=numpy_helper.from_array(array))

    def add(self, op: str, *inputs: str, outputs: int = 1, **attributes: Any) -> str | None:
        """Append a node, if it can be run on these inputs and its results are finite and small."""
        node = helper.make_node(op, inputs, [f"out{i}" for i in range(outputs)], **attributes)
        try:
            with np.errstate(all="ignore"):
                results = [np.asarray(r) for r in self._run(node)]
        except Exception:
            return None
        good = all(r.size <= LARGEST and (r.dtype.kind != "f" or np.all(np.abs(r) < 1e4)) for r in results)
        if not good or any(r.dtype.kind == "i" and np.any(np.abs(r) > 1 << 20) for r in results):
            return None
        node.name = self._node_name()
        for index, result in enumerate(results):
            node.output[index] = self._name()
            self.values[node.output[index]] = result
        self.nodes.append(node)
        return str(node.output[0])

    def _run(self, node: onnx.NodeProto) -> list[Any]:
        read = [name for name in self.values if name in node.input or node.op_type == "If"]
        graph = helper.make_graph(
            [node],
            "g",
            [],
            [onnx.ValueInfoProto(name=name) for name in node.output],
            [numpy_helper.from_array(self.values[name], name) for name in read],
        )
        result: list[Any] = ReferenceEvaluator(self._model(graph)).run(None, {})
        return result

    def _model(self, graph: onnx.GraphProto) -> onnx.ModelProto:
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", self.opset)], ir_version=8)

    def pick(self, wanted: Callable[[NDArray], bool]) -> str | None:
        """A tensor whose value is as wanted; late ones are more likely."""
        found = [name for name, value in self.values.items() if wanted(value)]
        return found[-1 - int(self.random.exponential(4)) % len(found)] if found else None

    def float(self, *ranks: int) -> str:
        return (
            self.pick(lambda v: v.dtype == np.float32 and v.size and (v.ndim in ranks or not ranks))
            or self._x
        )

    def chosen(self, *options: Any) -> Any:
        return options[int(self.random.integers(len(options)))]

    def finished(self) -> RandomModel:
        read = {name for node in self.nodes for name in node.input}
        made = [name for node in self.nodes for name in node.output if node.op_type != "Constant"]
        outputs = [name for name in made if name not in read] or made[-1:]
        outputs += [name for name in made if name in read and self.random.random() < 0.1]
        graph = helper.make_graph(
            self.nodes,
            "random",
            [helper.make_tensor_value_info(self._x, onnx.TensorProto.FLOAT, self._declared)],
            [self._info(name) for name in outputs],
            self._constants,
        )
        model = self._model(graph)
        if self.random.random() < 0.5:
            model = onnx.shape_inference.infer_shapes(model)
        return RandomModel(model, {self._x: self.values[self._x]})

    def _info(self, name: str) -> onnx.ValueInfoProto:
        value = self.values[name]
        return _info(name, value.dtype, value.ndim)

    # -- ways to grow

    def grow(self) -> None:
        self.chosen(*_WAYS)(self)

    def dimensions(self) -> str | None:
        """A vector of some dimensions of a tensor."""
        tensor = self.float()
        rank = self.values[tensor].ndim
        bounds = {}
        if self.opset >= 15 and self.random.random() < 0.5:
            bounds = {"start": int(self.random.integers(-rank - 1, rank + 1))} if rank else {}
        shape = self.add("Shape", tensor, **bounds)
        if shape is None or self.random.random() < 0.3:
            return shape
        if self.random.random() < 0.5:
            index = int(self.random.integers(-2, 2))
            taken = self.add(
                "Gather", shape, self.constant(self.chosen(index, [index], [0, index]), np.int64)
            )
            if taken is not None and self.values[taken].ndim == 0:
                taken = self.unsqueezed(taken, [0])
            return taken
        start, end, step = self.chosen((0, 1, 1), (1, 3, 1), (-2, 9, 1), (-1, -99, -1), (0, 1 << 62, 2))
        limits = [self.constant([value], np.int64) for value in (start, end, 0, step)]
        return self.add("Slice", shape, *limits)

    def unsqueezed(self, tensor: str, axes: Sequence[int]) -> str | None:
        if self.opset < 13:
            return self.add("Unsqueeze", tensor, axes=list(axes))
        return self.add("Unsqueeze", tensor, self.constant(list(axes), np.int64))

    def shape_arithmetic(self) -> None:
        """Dimensions through integers or floats, and back, as exporters write the sizes of a Resize."""
        sizes = self.dimensions()
        if sizes is None:
            return
        if self.random.random() < 0.6:
            as_float = self.add("Cast", sizes, to=onnx.TensorProto.FLOAT) or sizes
            op = self.chosen("Mul", "Add", "Div", "Sub", "Max", "Min")
            moved = self.add(op, as_float, self.constant(self.chosen(1.5, 0.5, 2.0, [0.75]), np.float32))
            if moved is not None and self.random.random() < 0.4:
                moved = self.add(self.chosen("Floor", "Ceil", "Round"), moved)
            sizes = moved and self.add(
                "Cast", moved, to=self.chosen(onnx.TensorProto.INT64, onnx.TensorProto.INT32)
            )
            sizes = sizes and self.add("Cast", sizes, to=onnx.TensorProto.INT64)
        else:
            op = self.chosen("Mul", "Add", "Sub", "Div")
            sizes = self.add(op, sizes, self.constant(self.chosen(2, 3, [1]), np.int64))
        if sizes is not None:
            self.sized(sizes)

    def sized(self, sizes: str) -> None:
        """Something whose shape is computed."""
        if np.any(self.values[sizes] < 0):
            return
        kind = self.chosen("ConstantOfShape", "Expand", "Concat", "Reshape", "Resize")
        if kind == "ConstantOfShape":
            value = numpy_helper.from_array(self.chosen(np.float32([1.5]), np.int64([3])))
            self.add(kind, sizes, value=value)
        elif kind == "Expand":
            self.add(kind, self.constant(self.chosen(2.5, -1.0), np.float32), sizes)
        elif kind == "Concat":
            joined = self.add(kind, sizes, self.constant([1], np.int64), axis=0)
            self.add("ReduceProd", joined or sizes, keepdims=0)
        elif kind == "Reshape":
            self.add(
                kind, self.float(), self.add("Concat", sizes, self.constant([-1], np.int64), axis=0) or ""
            )
        elif self.values[sizes].shape == (2,) and np.all(self.values[sizes] > 0):
            tensor = self.float(4)
            shape = self.constant(self.values[tensor].shape[:2], np.int64)
            target = self.add("Concat", shape, sizes, axis=0)
            empty = ["", ""] if self.opset > 12 else [self.constant([], np.float32) for _ in range(2)]
            self.add("Resize", tensor, *empty, target or "", mode="nearest")

    def integers(self) -> None:
        a = self.pick(lambda v: v.dtype == np.int64)
        if a is None:
            return
        b = self.constant(self.chosen(2, 3, -1), np.int64)
        made = self.add(self.chosen("Add", "Sub", "Mul", "Div", "Mod", "Max", "Min"), a, b)
        if made is not None and self.random.random() < 0.4:
            self.add("Cast", made, to=self.chosen(1, 6, 7, 9, 11))

    def booleans(self) -> None:
        a = self.float()
        truth = self.add(self.chosen("Greater", "Less"), a, self.constant(0.25, np.float32))
        if truth is None:
            return
        if self.random.random() < 0.5:
            truth = self.add("Not", truth) or truth
        self.add("Where", truth, a, self.constant(self.chosen(0.0, -1.0), np.float32))
        self.add("Cast", truth, to=self.chosen(1, 6, 7))

    def floats(self) -> None:
        tensor = self.float()
        for _ in range(int(self.random.integers(1, 4))):
            if self.random.random() < 0.5:
                made = self.add(self.chosen("Relu", "Neg", "Sigmoid", "Abs", "Identity", "LeakyRelu"), tensor)
            else:
                op = self.chosen("Add", "Sub", "Mul")
                constant = self.constant(self.random.normal(size=self.chosen((), (1,))), np.float32)
                made = self.add(op, tensor, constant)
            tensor = made or tensor
        if self.values[tensor].ndim and self.random.random() < 0.3:
            perm = [int(i) for i in self.random.permutation(self.values[tensor].ndim)]
            self.add("Transpose", tensor, perm=perm)

    def constants(self) -> None:
        """A part that depends on no input, and meets the rest in the end."""
        made: str | None = self.constant(self.random.normal(size=(2, 3)), np.float32)
        for _ in range(int(self.random.integers(1, 4))):
            op = self.chosen("Transpose", "Mul", "Cast", "Concat", "Tile", "Range", "Split", "Pow")
            if op == "Mul":
                made = made and self.add(op, made, self.constant(1.5, np.float32))
            elif op == "Concat":
                made = made and self.add(op, made, made, axis=0)
            elif op == "Cast":
                truncated = made and self.add(op, made, to=onnx.TensorProto.INT64)
                made = truncated and self.add(op, truncated, to=onnx.TensorProto.FLOAT)
            elif op == "Tile":
                made = made and self.add(op, made, self.constant([2, 1], np.int64))
            elif op == "Range":
                self.add(op, *(self.constant(value, np.int64) for value in (0, 5, 2)))
            elif op == "Split":
                made = made and self.add(
                    op, made, outputs=2, axis=0, **({"num_outputs": 2} if self.opset > 17 else {})
                )
            elif op == "Pow":
                made = made and self.add(op, made, self.constant(2.0, np.float32))
            else:
                made = made and self.add(op, made)
        if made is not None and self.values[made].size:
            total = self.add("ReduceMean", made, keepdims=0)
            self.add("Mul", self.float(), total or made)

    def layer(self) -> None:
        """A weighted layer, perhaps padded, normalized and activated; its bias may be another's, too."""
        tensor = self.float(4)
        channels = self.values[tensor].shape[1]
        if self.random.random() < 0.4:
            amounts = self.chosen(
                [0, 0, 1, 1, 0, 0, 1, 1], [0, 0, 2, 0, 0, 0, 0, 1], [0, 0, -1, 0, 0, 0, 1, 1]
            )
            tensor = self.add("Pad", tensor, self.constant(amounts, np.int64)) or tensor
        outputs, transposed = int(self.random.integers(2, 5)), self.random.random() < 0.2
        shape = (channels, outputs) if transposed else (outputs, channels)
        size = self.chosen(1, 2, 3)
        weight = self.constant(self.random.normal(0, 0.5, (*shape, size, size)), np.float32)
        made = self.add(
            "ConvTranspose" if transposed else "Conv",
            tensor,
            weight,
            *self._bias(outputs),
            pads=[0, size // 2] * 2,
        )
        self._normalized(made, outputs)

    def product(self) -> None:
        tensor = self.float(2, 3)
        if self.values[tensor].ndim == 4:
            tensor = self.add("Flatten", tensor) or tensor
        rank, inputs = self.values[tensor].ndim, self.values[tensor].shape[-1]
        if rank not in (2, 3) or inputs > 200:
            return
        outputs = int(self.random.integers(2, 5))
        kind = self.chosen("MatMul", "Gemm", "Einsum")
        across = kind == "Gemm" and self.random.random() < 0.5
        weight = self.random.normal(0, 0.5, (outputs, inputs) if across else (inputs, outputs))
        name = self.constant(weight, np.float32)
        if kind == "Gemm":
            attributes = self.chosen({}, {"alpha": 0.5, "beta": 2.0}, {"alpha": 2.0})
            made = self.add(kind, tensor, name, *self._bias(outputs), transB=int(across), **attributes)
            self._normalized(made, outputs)
        elif kind == "Einsum" and self.opset >= 12:
            letters = "abc"[:rank]
            turned = self.random.random() < 0.5
            result = f"z{letters[:-1]}" if turned else f"{letters[:-1]}z"
            self.add(kind, tensor, name, equation=f"{letters},{letters[-1]}z->{result}")
        elif (made := self.add("MatMul", tensor, name)) is not None:
            self.add("Add", made, *self._bias(outputs))

    def _bias(self, size: int) -> list[str]:
        if self.random.random() < 0.3:
            return []
        shared = [t.name for t in self._constants if tuple(t.dims) == (size,) and t.data_type == 1]
        if shared and self.random.random() < 0.5:
            return [str(self.chosen(*shared))]
        return [self.constant(self.random.normal(size=size), np.float32)]

    def _normalized(self, made: str | None, channels: int) -> None:
        if made is None:
            return
        if (
            self.opset >= 14 and self.random.random() < 0.5
        ):  # before, the reference normalizes by the batch's own
            low = ((-1.5, 1.5), (-1, 1), (-1, 1), (0.2, 2))
            values = [self.constant(self.random.uniform(*bounds, channels), np.float32) for bounds in low]
            made = self.add("BatchNormalization", made, *values, epsilon=self.chosen(1e-5, 0.1)) or made
        if self.random.random() < 0.5:
            self.add("Relu", made)

    def branch(self) -> None:
        """An If whose condition is known, or depends on the input's values."""
        tensor = self.float()
        if self.random.random() < 0.6:
            condition: str | None = self.constant(self.random.random() < 0.5, bool)
        else:
            total = self.add("ReduceMax", tensor, keepdims=0)
            condition = total and self.add("Greater", total, self.constant(0.5, np.float32))
        if condition is None:
            return
        bodies = {}
        for side, op in (("then_branch", "Neg"), ("else_branch", "Relu")):
            inner, factor, result = (self._inner_name() for _ in range(3))
            constant = numpy_helper.from_array(np.float32(1.5))
            bodies[side] = helper.make_graph(
                [
                    helper.make_node("Constant", [], [factor], self._node_name(), value=constant),
                    helper.make_node(op, [tensor], [inner], self._node_name()),
                    helper.make_node("Mul", [inner, factor], [result], self._node_name()),
                ],
                side,
                [],
                [_info(result, np.dtype(np.float32), self.values[tensor].ndim)],
            )
        self.add("If", condition, **bodies)


def _info(name: str, dtype: np.dtype, rank: int) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(dtype), [None] * rank)


_WAYS = (
    _Builder.shape_arithmetic,
    _Builder.shape_arithmetic,
    _Builder.integers,
    _Builder.booleans,
    _Builder.floats,
    _Builder.constants,
    _Builder.layer,
    _Builder.layer,
    _Builder.product,
    _Builder.branch,
)
