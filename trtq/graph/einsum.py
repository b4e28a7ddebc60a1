"""Einsum as MatMul, where it is one matrix product: TensorRT runs only MatMul in INT8."""

from __future__ import annotations

import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod

import numpy as np
import onnx_graphsurgeon as gs

from trtq.graph.names import Names


def einsum_to_matmul(graph: gs.Graph) -> None:
    """Write an Einsum that is a matrix product as MatMul, in place.

    Transposes stand where the order of axes differs, and Reshapes where several axes are the rows, the
    columns or the inner axis of the product.
    """
    names = Names(graph)
    for node in [n for n in graph.nodes if n.op == "Einsum" and len(n.inputs) == 2]:
        terms = _terms(node)
        if terms is None:
            continue
        a, b, result = terms
        orders = ((a, b, node.inputs), (b, a, node.inputs[::-1]))
        found = [p for left, right, tensors in orders if (p := _Product.of(left, right, result, tensors))]
        if found:
            min(found, key=lambda product: product.merged).replace(graph, names, node, result)


def _terms(node: gs.Node) -> tuple[str, str, str] | None:
    """The axes of both operands and of the result, a letter each; None where the ranks are not known."""
    operands, arrow, result = node.attrs["equation"].replace(" ", "").partition("->")
    terms = operands.split(",")
    free = [letter for letter in string.ascii_letters if letter not in operands + result]
    hidden = 0
    for index, tensor in enumerate(node.inputs):
        if "..." in terms[index]:
            if tensor.shape is None:
                return None
            count = len(tensor.shape) - len(terms[index]) + 3
            hidden = max(hidden, count)
            terms[index] = terms[index].replace("...", _last(free, count))
    if not arrow:
        joined = "".join(operands.replace("...", "").split(","))
        result = "..." + "".join(sorted(letter for letter in joined if joined.count(letter) == 1))
    return terms[0], terms[1], result.replace("...", _last(free, hidden))


def _last(letters: Sequence[str], count: int) -> str:
    """Names for the last of the axes that an ellipsis stands for: they are aligned at their end."""
    return "".join(reversed(letters[:count]))


@dataclass(frozen=True)
class _Product:
    """A product of two tensors, one of whose axes names each letter.

    Attributes:
        left, right: the operands' axes in their order.
        batch: axes of both operands and of the result.
        rows, columns: those of the left or right operand and of the result.
        summed: those of both operands.
        tensors: the operands.
        sizes: axis -> its size, where it is known.
    """

    left: str
    right: str
    batch: str
    rows: str
    summed: str
    columns: str
    tensors: Sequence[gs.Tensor]
    sizes: Mapping[str, int]

    @classmethod
    def of(cls, left: str, right: str, result: str, tensors: Sequence[gs.Tensor]) -> _Product | None:
        """The product; None where it is none, or where it cannot be reshaped to be one."""
        if not (left + right + result).isalpha() or any(len(set(t)) < len(t) for t in (left, right, result)):
            return None
        shared = [axis for axis in left if axis in right]
        product = cls(
            left,
            right,
            batch="".join(axis for axis in shared if axis in result),
            rows="".join(axis for axis in left if axis not in right),
            summed="".join(axis for axis in shared if axis not in result),
            columns="".join(axis for axis in right if axis not in left),
            tensors=tensors,
            sizes=_sizes(left, right, tensors),
        )
        return product if product._is_one(result) else None

    def _is_one(self, result: str) -> bool:
        if not (self.rows and self.summed and self.columns):
            return False
        if set(result) != set(self.batch + self.rows + self.columns) or self._is_stretched():
            return False
        apart = [axis for axis in (self.rows if self.batch else "") + self.columns if axis not in self.sizes]
        return not self.merged or (all(axis in self.sizes for axis in self.summed) and len(apart) < 2)

    def _is_stretched(self) -> bool:
        """Whether one operand is repeated along an axis that is summed, which MatMul does not."""
        for axis in self.summed:
            pairs = zip((self.left, self.right), self.tensors, strict=True)
            sizes = [t.shape[term.index(axis)] for term, t in pairs if t.shape is not None]
            if sizes.count(1) == 1:
                return True
        return False

    @property
    def merged(self) -> bool:
        """Whether several axes have to become one."""
        return self._many_rows or len(self.summed) > 1 or len(self.columns) > 1

    @property
    def _many_rows(self) -> bool:
        """Whether the rows have to become one axis; without a batch MatMul takes any number of them."""
        return bool(self.batch) and len(self.rows) > 1

    def replace(self, graph: gs.Graph, names: Names, node: gs.Node, result: str) -> None:
        """Make a node this product, whose result has its axes in the given order."""
        add = _Adder(graph, names, node.name)
        batch = [0] * len(self.batch)
        inner = prod(self.sizes.get(axis, 0) for axis in self.summed)
        left, right = self.tensors
        left = add.transpose(left, self.left, self.batch + self.rows + self.summed, "left")
        if self._many_rows or len(self.summed) > 1:
            rows = [-1] if self.batch else [0] * len(self.rows)
            left = add.reshape(left, [*batch, *rows, inner], "left")
        right = add.transpose(right, self.right, self.batch + self.summed + self.columns, "right")
        if len(self.summed) > 1 or len(self.columns) > 1:
            right = add.reshape(right, [*batch, inner, -1], "right")
        outputs = list(node.outputs)
        node.op, node.attrs, node.inputs = "MatMul", {}, [left, right]
        made, parted = self.batch + self.rows + self.columns, self._many_rows or len(self.columns) > 1
        if not parted and made == result:
            return
        node.outputs = [gs.Variable(names.tensor(f"{node.name}/product"))]
        product: gs.Tensor = node.outputs[0]
        if parted:
            rows = [self.sizes.get(axis, -1) if self.batch else 0 for axis in self.rows]
            columns = [self.sizes.get(axis, -1) for axis in self.columns]
            product = add.reshape(product, [*batch, *rows, *columns], "product")
        product = add.transpose(product, made, result, "result")
        product.inputs[0].outputs = outputs


def _sizes(left: str, right: str, tensors: Sequence[gs.Tensor]) -> dict[str, int]:
    found: dict[str, int] = {}
    for term, tensor in zip((left, right), tensors, strict=True):
        for axis, size in zip(term, tensor.shape or (), strict=False):
            if isinstance(size, (int, np.integer)):
                found[axis] = max(int(size), found.get(axis, 1))
    return found


@dataclass(frozen=True)
class _Adder:
    """Adds nodes to a graph, named after another."""

    graph: gs.Graph
    names: Names
    prefix: str

    def transpose(self, tensor: gs.Tensor, axes: str, order: str, what: str) -> gs.Tensor:
        """`tensor`, whose axes are named `axes`, transposed to `order`."""
        if axes == order:
            return tensor
        perm = [axes.index(axis) for axis in order]
        return self._node("Transpose", [tensor], {"perm": perm}, f"{what}_transposed")

    def reshape(self, tensor: gs.Tensor, shape: list[int], what: str) -> gs.Tensor:
        """`tensor` in another shape; 0 stands for the size that it has there."""
        name = self.names.tensor(f"{self.prefix}/{what}_shape")
        return self._node("Reshape", [tensor, gs.Constant(name, np.array(shape))], {}, f"{what}_reshaped")

    def _node(self, op: str, inputs: list[gs.Tensor], attrs: Mapping[str, object], what: str) -> gs.Tensor:
        name = f"{self.prefix}/{what}"
        made = gs.Variable(self.names.tensor(name), inputs[0].dtype)
        self.graph.nodes.append(gs.Node(op, self.names.node(name), dict(attrs), inputs, [made]))
        return made
