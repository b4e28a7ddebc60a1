"""Polygraphy loaders: trtq's INT8 model of an fp32 ONNX model, and a session that simulates it.

They work when called, as Polygraphy's own do; trtq's errors become `PolygraphyException`, which Polygraphy's
tools print without a traceback.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from polygraphy import util
from polygraphy.backend.base import BaseLoader
from polygraphy.logger import G_LOGGER

from trtq.console import Console
from trtq.errors import InputError, TrtqError
from trtq.recipe import Recipe

if TYPE_CHECKING:
    from onnx import ModelProto
    from onnxruntime import InferenceSession


class Int8OnnxFromPath(BaseLoader):
    """Functor that makes trtq's explicit INT8 (Q/DQ) model of an fp32 ONNX model."""

    def __init__(
        self,
        path: str,
        data: str | None = None,
        table: str | None = None,
        recipe: str | None = None,
        method: str | None = None,
        exclude: Sequence[str] | None = None,
        rest: str | None = None,
        layers: bool | None = None,
    ) -> None:
        """
        Args:
            path: the fp32 ONNX model.
            data: calibration data (see `trtq.data.load`); a table is made of it, or found in trtq's cache.
            table: calibration table to take the scales from; takes precedence over the data of a recipe.
            recipe: recipe file of trtq with these and all other options. What is given here takes precedence.
            method, exclude, rest: see `trtq.recipe.Recipe`; here the rest is in fp32 by default.
            layers: inner tensors are to be compared with the fp32 model's: the free fixes are left out, which
                change what tensors hold though not what the model computes.

        Raises:
            PolygraphyException: neither data nor table, or both; or the recipe cannot be used.
        """
        with _polygraphy_errors():
            if data is not None and table is not None:
                raise InputError("data and a table are given", remedy="a table already holds the scales")
            given = {"model": path, "data": data, "method": method, "exclude": exclude, "rest": rest}
            self._recipe = (Recipe.load(recipe) if recipe else Recipe()).merged(given)
            if self._recipe.rest == "auto":  # tensors are compared with those of the fp32 model
                self._recipe = self._recipe.merged({"rest": "fp32"})
            if layers:
                steps = [step for step in self._recipe.recover if step != "fix"]
                self._recipe = self._recipe.changed({"recover": steps})
            if self._recipe.data is None and table is None:
                raise InputError(
                    "nothing gives the scales of the INT8 model",
                    remedy="give data (--trtq-data), a table (--trtq-table), or a recipe with data",
                )
        self._table = table

    @util.check_called_by("__call__")
    def call_impl(self) -> ModelProto:
        """
        Returns:
            onnx.ModelProto: the model with Q/DQ; inputs, outputs and tensors keep their names.

        Raises:
            PolygraphyException: the model, data or table cannot be used.
        """
        from trtq.graph.model import export
        from trtq.pipeline import quantize

        with _polygraphy_errors():
            recipe = self._recipe
            quantization, graph = quantize(recipe, self._table, _LOG)
            _LOG.say("plan", quantization.plan.text())
            return export(graph)


class MarkSharedOutputs(BaseLoader):
    """Functor that gives the INT8 model those outputs of the fp32 model that it has as tensors.

    Layers can then be compared one by one. What folding removed, and what Q/DQ added, has no counterpart.
    """

    def __init__(
        self, int8: ModelProto | Callable[[], ModelProto], fp32: ModelProto | Callable[[], ModelProto]
    ) -> None:
        """
        Args:
            int8: the model of `Int8OnnxFromPath`, or a loader of it.
            fp32: the model that it was made of, with outputs marked, or a loader of it.
        """
        self._int8, self._fp32 = int8, fp32

    @util.check_called_by("__call__")
    def call_impl(self) -> ModelProto:
        """
        Returns:
            onnx.ModelProto: the INT8 model with other outputs.

        Raises:
            PolygraphyException: no output of the fp32 model is a tensor of the INT8 model.
        """
        from polygraphy.backend.onnx import modify_outputs

        int8, _ = util.invoke_if_callable(self._int8)
        fp32, _ = util.invoke_if_callable(self._fp32)
        tensors = {name for node in int8.graph.node for name in node.output}
        return modify_outputs(int8, outputs=[o.name for o in fp32.graph.output if o.name in tensors])


class SimulationFromOnnxBytes(BaseLoader):
    """Functor that makes an ONNX Runtime session that runs Q/DQ faithfully, as exact quantizers."""

    def __init__(self, model_bytes: bytes | Callable[[], bytes]) -> None:
        """
        Args:
            model_bytes: a serialized ONNX model, or a loader of one.
        """
        self._model_bytes = model_bytes

    @util.check_called_by("__call__")
    def call_impl(self) -> InferenceSession:
        """
        Returns:
            onnxruntime.InferenceSession: see `trtq.simulation.session.simulation_session`.

        Raises:
            PolygraphyException: ONNX Runtime cannot load the model.
        """
        from trtq.simulation.session import simulation_session

        model_bytes, _ = util.invoke_if_callable(self._model_bytes)
        with _polygraphy_errors():
            return simulation_session(model_bytes)


class _Log(Console):
    """What trtq says while it works, in Polygraphy's log."""

    def say(self, label: str, text: str) -> None:
        G_LOGGER.info(f"trtq | {label}: {text}")

    def warn(self, text: str) -> None:
        G_LOGGER.warning(f"trtq | {text}")


_LOG = _Log()


@contextlib.contextmanager
def _polygraphy_errors() -> Iterator[None]:
    try:
        yield
    except TrtqError as error:
        G_LOGGER.critical(f"trtq | {error}")
