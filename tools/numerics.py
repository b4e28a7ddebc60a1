"""How far mere numerics move a verdict: the drop of delivered models, computed in several legitimate ways.

For each result folder of `trtq deploy`: the drop as the gate simulates it (each operator a kernel), `fused`
(nothing rounded to float16 between operators, sums in another order), and simulated with every product of
every layer changed by about what the order of a sum changes, several times. Verdicts that lie closer to the
margin than these figures to each other rest on luck.

    python tools/numerics.py FOLDER... [--draws N]
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import onnx
from onnx import ModelProto, helper, numpy_helper

from trtq.backends.engine import input_specs
from trtq.data.load import load_samples
from trtq.gate.metrics import load_metric
from trtq.simulation.narrow import in_float32
from trtq.simulation.outputs import run_model
from trtq.simulation.rows import Runner
from trtq.simulation.similarity import compare
from trtq.simulation.values import AllValues

JITTER = 2.0**-22
"""Relative; float32 rounds by up to 2 ** -24, and a long sum by several times that."""

PRODUCTS = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})


def jittered(model: ModelProto, seed: int) -> bytes:
    """The model with the result of every product times a number of its own that is 1 but for `JITTER`."""
    draw, wide = np.random.default_rng(seed), in_float32(model)
    nodes = []
    for node in wide.graph.node:
        nodes.append(node)
        if node.op_type in PRODUCTS:
            result, factor, node.output[0] = node.output[0], f"{node.name}/factor", f"{node.name}/exact"
            nodes.append(helper.make_node("Mul", [node.output[0], factor], [result]))
            values = np.float32(1 + JITTER * draw.uniform(-1, 1))
            wide.graph.initializer.append(numpy_helper.from_array(values, factor))
    del wide.graph.node[:]
    wide.graph.node.extend(nodes)
    content: bytes = wide.SerializeToString()
    return content


def report(folder: Path, draws: int) -> None:
    """Print one folder's lines."""
    inputs = json.loads((folder / "manifest.json").read_text())["inputs"]
    model, delivered = Path(inputs["model"]["file"]), folder / "model.int8.onnx"
    samples = load_samples(inputs["eval"]["source"], input_specs([model]))
    proto, metric = onnx.load(delivered), load_metric(inputs["metric"]["name"])

    def outputs(tried: Path | bytes, *, fused: bool = False) -> AllValues:
        return run_model(delivered, samples, runner=Runner(tried, fused=fused)).arrays

    reference = outputs(model)

    def drop(found: AllValues) -> float:
        value = metric.value(found, dict(samples.targets), reference)
        return 100 * (1 - value / metric.value(reference, dict(samples.targets), reference))

    simulated, fused = outputs(delivered), outputs(delivered, fused=True)
    print(f"{folder}: drop in %, lowest SQNR of an output")
    print(f"  simulated {drop(simulated):.3f}, {lowest_db(reference, simulated):.1f} dB")
    print(
        f"  fused     {drop(fused):.3f}, {lowest_db(reference, fused):.1f} dB;"
        f" {lowest_db(simulated, fused):.1f} dB from the simulated",
        flush=True,
    )
    found = [drop(outputs(jittered(proto, seed))) for seed in range(draws)]
    drops = " ".join(f"{each:.3f}" for each in found)
    print(f"  jittered  {drops}: s.d. {np.std(found, ddof=1):.3f}", flush=True)


def lowest_db(reference: AllValues, candidate: AllValues) -> float:
    return min(item.sqnr_db for item in compare(reference, candidate).values())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--draws", type=int, default=8)
    given = parser.parse_args()
    for folder in given.folders:
        report(folder, given.draws)


if __name__ == "__main__":
    main()
