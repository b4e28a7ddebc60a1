"""The ends that a recipe asks for (`--io`): which inputs and outputs of the engine are 8-bit numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import onnx_graphsurgeon as gs

from trtq.calibration.calibrate import FloatGraph, reach_of
from trtq.errors import InputError
from trtq.graph.codes import Code, Image
from trtq.graph.ends import Ends, why_float
from trtq.graph.quantization import Quantization
from trtq.job import Job
from trtq.numerics import has_scale, scale_from_amax
from trtq.recipe import Recipe


def ends_of(job: Job) -> Ends:
    """The ends that the job's recipe asks for; the scales of outputs are those of their largest magnitudes on
    the calibration data.

    Raises:
        InputError: as `wanted_ends`.
    """
    reached = {}
    if job.recipe.io == "int8-in-out":
        found = reach_of(job, FloatGraph.of(job.model))
        reached = {t.name: found[t.name] for t in job.model.graph.outputs if t.name in found}
    scales = {
        name: float(scale_from_amax(amax))
        for name, amax in reached.items()
        if math.isfinite(amax) and has_scale(amax)
    }
    return wanted_ends(job.recipe, job.model.graph, scales)


def wanted_ends(
    recipe: Recipe, graph: gs.Graph, scales: Mapping[str, np.float32] | Mapping[str, float]
) -> Ends:
    """The ends that a recipe asks for.

    Args:
        graph: of the float model.
        scales: tensor -> scale, of outputs among others.

    Raises:
        InputError: image inputs are wanted, and the recipe does not say how one is made of pixels; int8
            outputs are, and none has a scale.
    """
    if recipe.io == "uint8":
        return Ends(images=_images(recipe, graph))
    names = [tensor.name for tensor in graph.outputs] if recipe.io == "int8-in-out" else []
    outputs = {name: float(scales[name]) for name in names if name in scales}
    if names and not outputs:
        raise InputError(
            "--io int8-in-out: no output of the model has a scale",
            cause="they hold no floats, only zeros, or values that are not finite",
            remedy="use --io int8, which is of the inputs alone",
        )
    return Ends(int8=recipe.io != "float", outputs=outputs)


def _images(recipe: Recipe, graph: gs.Graph) -> dict[str, Image]:
    """The inputs that the recipe makes of pixels."""
    found = {}
    for tensor in graph.inputs:
        made = recipe.preprocess.get(tensor.name)
        if tensor.dtype == np.float32 and made and {"scale", "mean", "std"} & made.options.keys():
            found[tensor.name] = made.image()
    if not found:
        raise InputError(
            "--io uint8 needs images whose pixels the engine can scale itself",
            cause="no input of the model has scale, mean or std in a [preprocess.<input>] of the recipe",
            remedy="give the images as uint8 and say there how they become the input; or use --io int8",
        )
    return found


def host_lines(quantization: Quantization, codes: Mapping[str, Code]) -> list[str]:
    """What the host does for each end that holds 8-bit numbers, and why other inputs do not."""
    plain = quantization.rewritten()
    inputs = {tensor.name: tensor for tensor in plain.inputs}
    lines = [
        f"{name} is {code.dtype}: {code.host_line(name, output=name not in inputs)}"
        for name, code in codes.items()
    ]
    for name, tensor in inputs.items():
        if name not in codes and quantization.ends.int8 and (reason := why_float(plain, tensor)):
            lines.append(f"{name} stays as it is: {reason}")
    missing = [tensor.name for tensor in plain.outputs if tensor.name not in codes]
    if quantization.ends.outputs and missing:
        lines.append(f"{', '.join(missing)}: no scale, the output stays as it is")
    return lines
