"""What the kernels of an engine with a placement have to do: which tensors are INT8, and what converts them.

Source: the engines of NVIDIA's TensorRT engine explorer, and "Q/DQ Placement Recommendations" in the TensorRT
developer guide.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field

from trtq.cost.fused import Fused, Kernel, Read
from trtq.cost.interface import Builder, Precision, Rest
from trtq.cost.roofline import BYTES, THIN, Load, converted, stored_bytes
from trtq.graph.plan import Plan


@dataclass(frozen=True)
class Conversion:
    """A kernel that quantizes, converts or copies a tensor for those who read it.

    Attributes:
        made: the datatype that it makes.
    """

    tensor: str
    made: Precision
    load: Load


@dataclass(frozen=True)
class Placed:
    """A kernel of an engine.

    Attributes:
        load: what it has to do.
        before: what is converted for it and for those behind it that read the same.
        after: the kernel that does what it fuses with, where the builder does not.
    """

    kernel: Kernel
    load: Load
    before: tuple[Conversion, ...]
    after: tuple[Load, ...] = ()


def placed(
    fused: Fused,
    plan: Plan,
    rest: Rest,
    builder: Builder = "tensorrt",
    int8_inputs: Collection[str] = (),
) -> list[Placed]:
    """The kernels of the engine that has a plan's nodes in INT8 and Q/DQ on its edges.

    A tensor is written in INT8 where all who read it want so and what writes it can quantize: INT8 products,
    generated kernels, and what only moves values that it reads in INT8. Else it is written in floating
    point, and a kernel of its own quantizes it, once for each range.

    Args:
        int8_inputs: model inputs that the engine takes in INT8 where only INT8 kernels read them.
    """
    return _Placing(fused, plan, rest, builder, int8_inputs).kernels()


@dataclass
class _Use:
    """How a tensor is read: in floating point, and in INT8 by which ranges, first by which kernel."""

    in_float: bool = False
    ranges: dict[str, None] = field(default_factory=dict)
    first: int = 0
    readers: list[Kernel] = field(default_factory=list)

    @property
    def only_int8(self) -> bool:
        return bool(self.ranges) and not self.in_float


class _Placing:
    def __init__(
        self, fused: Fused, plan: Plan, rest: Rest, builder: Builder, int8_inputs: Collection[str]
    ) -> None:
        self._fused = fused
        self._rest: Rest = rest
        self._builder = builder
        self._int8_inputs = int8_inputs
        self._int8 = set(plan.int8_nodes)
        self._edges = {(edge.node, edge.index): edge.range for edge in plan.edges}
        self._uses: dict[str, _Use] = {}
        self._quantized: set[tuple[int, str]] = set()
        self._stored: dict[str, Precision] = {}
        self._in_rows = set(fused.inputs)
        self._before: dict[int, list[Conversion]] = {}

    def kernels(self) -> list[Placed]:
        for name in self._fused.outputs:
            self._use(name).in_float = True
        for position in reversed(range(len(self._fused.kernels))):
            self._read(position)
        for name in self._fused.inputs:
            self._write(name, "fp32", may_quantize=name in self._int8_inputs)
        found = []
        for position, kernel in enumerate(self._fused.kernels):
            loads = self._loads(position, kernel)
            before = self._before.get(position, [])
            if not loads and before:
                loads, before = [before[0].load], before[1:]
            if loads:
                found.append(Placed(kernel, loads[0], tuple(before), tuple(loads[1:])))
        return found

    def _use(self, name: str) -> _Use:
        return self._uses.setdefault(name, _Use())

    # --- from the end to the beginning: who wants INT8 ---

    def _read(self, position: int) -> None:
        kernel = self._fused.kernels[position]
        carried = self._carried(kernel)
        for read in kernel.reads:
            ranges = {self._edges.get(end, carried): None for end in read.ends}
            use = self._use(read.tensor)
            use.readers.append(kernel)
            if None in ranges:
                use.in_float = True
            else:
                self._quantized.add((position, read.tensor))
            if wanted := {name: None for name in ranges if name is not None}:
                use.ranges |= wanted
                use.first = position

    def _carried(self, kernel: Kernel) -> str | None:
        """The range that all who read what a kernel only moves want: quantizing goes in front of it, too."""
        uses = [self._use(name) for name in kernel.writes]
        ranges = {name for use in uses for name in use.ranges}
        if not kernel.keeps_values or len(ranges) != 1 or not all(use.only_int8 for use in uses):
            return None
        return ranges.pop()

    # --- from the beginning to the end: who can give it ---

    def _loads(self, position: int, kernel: Kernel) -> list[Load]:
        """What a kernel has to do, and what another one has to do for it."""
        is_int8 = bool(kernel.weighted) and self._int8.issuperset(kernel.weighted)
        quantized = [(position, read.tensor) in self._quantized for read in kernel.reads]
        kept: Precision = self._rest
        if kernel.keeps_values and kernel.reads:
            kept = self._stored.get(kernel.reads[0].tensor, self._rest)
            kept = self._rest if kept == "int8" else kept
        elif is_int8 and all(0 < gemm.channels <= THIN for gemm in kernel.gemms):
            kept = "fp32"  # dp4a's kernels write INT8 or float32
        if kernel.work in ("product", "attention"):
            may = is_int8
        else:
            may = kernel.work == "pointwise" or (bool(quantized) and all(quantized))
        sizes = [
            self._read_bytes(position, kernel, read, as_int8)
            for read, as_int8 in zip(kernel.reads, quantized, strict=True)
        ]
        unfused = self._builder == "tensorrt-rtx" and is_int8 and kernel.work == "product"
        joined = unfused and self._is_joined(kernel)
        if joined and kernel.is_conv:
            kept = "fp32"
        for name in kernel.writes:
            self._write(name, kept, may_quantize=may)
        written = [stored_bytes(self._shape(name), self._stored[name]) for name in kernel.writes]
        if kernel.work == "view":
            return self._copies(position, kernel)
        precision: Precision = self._rest
        if is_int8 or (not kernel.weighted and quantized and all(quantized)):
            precision = "int8"
        weights = kernel.weights * BYTES[precision if is_int8 else self._rest]
        if unfused:
            loads = self._unfused(kernel, weights, sizes, written)
            return loads[:1] if joined else loads
        moved = sum(converted(self._shape(name)) for name in kernel.writes) if kernel.work == "move" else 0
        every = (weights, *sizes, *written) if weights else (*sizes, *written)
        return [Load(precision, tuple(kernel.gemms), every, moved)]

    def _is_joined(self, kernel: Kernel) -> bool:
        """Whether a product's sums have one reader, a generated kernel, which does what follows as well."""
        use = self._use(kernel.writes[0]) if len(kernel.writes) == 1 else None
        alone = use is not None and not use.ranges and [each.work for each in use.readers] == ["pointwise"]
        return alone and kernel.writes[0] not in self._fused.outputs and len(kernel.reads) == kernel.operands

    def _unfused(self, kernel: Kernel, weights: int, sizes: list[int], written: list[int]) -> list[Load]:
        """An INT8 product of TensorRT for RTX, which writes its sums, and what is done to them.

        Sums are float32 of convolutions, else of the rest's type. Depthwise convolutions take every channel
        in a pack of four. (Seen in engines of TensorRT for RTX 1.7.1.)
        """
        elements = sum(gemm.m * gemm.n * gemm.count for gemm in kernel.gemms)
        sums = elements * BYTES["fp32" if kernel.is_conv else self._rest]
        operands, others = sizes[: kernel.operands], sizes[kernel.operands :]
        if kernel.is_conv and all(gemm.n == 1 for gemm in kernel.gemms):
            operands = [size for operand in operands for size in (4 * operand, 3 * operand)]
        whole = Load("int8", tuple(kernel.gemms), (weights, *operands, sums))
        return [whole, Load(self._rest, (), (sums, *others, *written))]

    def _copies(self, position: int, kernel: Kernel) -> list[Load]:
        """What copies tensors to where they are concatenated, where they cannot be written there."""
        loads = []
        for read in kernel.reads:
            if read.copied:
                shape, stored = self._shape(read.tensor), self._stored.get(read.tensor, self._rest)
                made: Precision = "int8" if (position, read.tensor) in self._quantized else stored
                size = stored_bytes(shape, made)
                load = Load(self._rest, (), (size, size), converted(shape))
                loads.append(Conversion(read.tensor, made, load))
        self._before.setdefault(position, []).extend(loads)
        return []

    def _shape(self, name: str) -> tuple[int, ...]:
        return self._fused.shapes.get(name, (0,))

    def _read_bytes(self, position: int, kernel: Kernel, read: Read, as_int8: bool) -> int:
        """Bytes of a tensor that a kernel reads.

        What is float32 beside float16 is converted for all but generated kernels, and model inputs are
        rearranged for convolutions, whose channels lie together.
        """
        name, share = read.tensor, read.share
        shape, stored = self._shape(name), self._stored.get(name, self._rest)
        if as_int8:
            return int(stored_bytes(shape, "int8") * share)
        takes = kernel.keeps_values or kernel.work == "pointwise"
        turned = name in self._in_rows and kernel.is_conv and len(shape) > 3
        if turned or (stored != self._rest and not takes):
            sizes = (stored_bytes(shape, stored), stored_bytes(shape, self._rest))
            conversion = Conversion(name, self._rest, Load(self._rest, (), sizes, converted(shape)))
            self._before.setdefault(position, []).append(conversion)
            self._in_rows.discard(name)
            stored = self._stored[name] = self._rest
        return int(stored_bytes(shape, stored) * share)

    def _write(self, name: str, kept: Precision, *, may_quantize: bool) -> None:
        """Decide how a tensor is stored, and put what quantizes it in front of its first reader in INT8."""
        use = self._uses.get(name)
        ranges = list(use.ranges) if use else []
        as_int8 = bool(use and use.only_int8 and may_quantize)
        self._stored[name] = "int8" if as_int8 else kept
        for _ in ranges[as_int8:]:
            shape = self._shape(name)
            sizes = (stored_bytes(shape, self._stored[name]), stored_bytes(shape, "int8"))
            assert use is not None
            conversion = Conversion(name, "int8", Load(self._rest, (), sizes, converted(shape)))
            self._before.setdefault(use.first, []).append(conversion)
