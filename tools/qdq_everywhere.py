"""Quantize a model naively: Q/DQ on every floating-point activation that any operator reads.

What placement rules are measured against (tools/compare_peers.py): a quantizer that buys nothing costs a
kernel or memory traffic. Ranges are the maxima of the calibration data; weights are quantized as trtq does.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import onnx_graphsurgeon as gs

from trtq.calibration.collect import collect
from trtq.calibration.methods import parse_method, scales_from
from trtq.data.load import load_samples
from trtq.graph.fold import fold
from trtq.graph.model import load_model, save_model
from trtq.graph.place import FLOATS, place
from trtq.graph.plan import Edge
from trtq.graph.quantization import Quantization


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("model", "data", "output"):
        parser.add_argument(name, type=Path)
    arguments = parser.parse_args()
    model = load_model(arguments.model)
    fold(model.graph)
    edges = [
        Edge(tensor.name, node.name, index, "everywhere", tensor.name)
        for node in model.graph.nodes
        for index, tensor in enumerate(node.inputs)
        if isinstance(tensor, gs.Variable) and tensor.name and tensor.dtype in FLOATS and tensor.shape
    ]
    plan = replace(place(model), edges=edges)
    samples = load_samples(str(arguments.data), model.inputs)
    scales = scales_from(collect(model.graph, plan.tensors, samples), parse_method("max"))
    save_model(Quantization(model.graph, plan, scales).rewritten(), arguments.output)


if __name__ == "__main__":
    main()
