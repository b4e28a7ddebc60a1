"""The extension module: argument groups of `polygraphy run` that write calls of `loaders` into its script.

Polygraphy imports this module at every start, whichever tool is run, so it imports nothing of trtq.
"""

from __future__ import annotations

import os
from argparse import Namespace

from polygraphy import config
from polygraphy.logger import G_LOGGER
from polygraphy.tools.args import (
    ModelArgs,
    OnnxLoadArgs,
    TrtLoadEngineArgs,
    TrtLoadPluginsArgs,
    TrtRunnerArgs,
)
from polygraphy.tools.args import util as args_util
from polygraphy.tools.args.base import BaseArgs, BaseRunnerArgs
from polygraphy.tools.script import Script, make_invocable, safe


def export_argument_groups() -> list[BaseArgs]:
    """What the entry point of the group `polygraphy.run.plugins` names."""
    return [Int8ModelArgs(), SimulationRunnerArgs(), EngineRunnerArgs()]


class Int8ModelArgs(BaseArgs):
    """
    trtq INT8 Model: making an explicit INT8 (Q/DQ) model of the fp32 ONNX model with trtq.

    Depends on:

        - ModelArgs
        - OnnxLoadArgs
    """

    def add_parser_args_impl(self) -> None:
        add = self.group.add_argument
        add("--trtq-data", help="Calibration data: .npz, a folder, a .csv of images, or script.py:function")
        add("--trtq-table", help="Take the scales from this calibration table instead of from data")
        add("--trtq-method", help="max, entropy, mse, percentile:P, or auto (measured choice; the default)")
        add(
            "--trtq-exclude",
            nargs="+",
            help="Leave these nodes in floating point: names with * and ?, or op:Type",
        )
        add("--trtq-rest", choices=("fp32", "fp16"), help="Precision of what is not quantized")
        add(
            "--trtq-recipe",
            help="trtq's recipe, for these and other options, such as preprocessing; the command line wins",
        )

    def parse_impl(self, args: Namespace) -> None:
        """
        Parses command-line arguments and populates the following attributes:

        Attributes:
            options (Dict[str, Any]): Keyword arguments of ``Int8OnnxFromPath``; None where not given.
        """
        paths = {name: args_util.get(args, f"trtq_{name}") for name in ("data", "table", "recipe")}
        others = {name: args_util.get(args, f"trtq_{name}") for name in ("method", "exclude", "rest")}
        self.options = {name: path and os.path.abspath(path) for name, path in paths.items()} | others

    def add_to_script_impl(self, script: Script, allow_custom_outputs: bool = True) -> Script.String:
        """
        Args:
            allow_custom_outputs (bool):
                    Whether to mark the tensors that ``--onnx-outputs`` asks for. TensorRT needs the types of
                    outputs, which marked ones lack.

        Returns:
            str: The name of the loader of the serialized INT8 model.
        """
        model = self.arg_groups[ModelArgs]
        if not model.model_type.is_onnx():
            G_LOGGER.critical(f"trtq quantizes ONNX models; {model.path} is of type {model.model_type}")
        script.add_import(["Int8OnnxFromPath"], frm="trtq_polygraphy.loaders")
        onnx = self.arg_groups[OnnxLoadArgs]
        layers = True if allow_custom_outputs and onnx.must_use_onnx_loader() else None
        loader = script.add_loader(
            make_invocable("Int8OnnxFromPath", model.path, **self.options, layers=layers), "quantize_onnx"
        )
        if layers:
            script.add_import(["MarkSharedOutputs"], frm="trtq_polygraphy.loaders")
            fp32 = onnx.add_to_script(script)
            loader = script.add_loader(make_invocable("MarkSharedOutputs", loader, fp32), "mark_int8_outputs")
        script.add_import(["BytesFromOnnx"], frm="polygraphy.backend.onnx")
        return script.add_loader(make_invocable("BytesFromOnnx", loader), "serialize_int8_onnx")


class SimulationRunnerArgs(BaseRunnerArgs):
    """
    trtq INT8 Simulation: simulating the INT8 model of trtq on the CPU.

    Depends on:

        - Int8ModelArgs
    """

    def get_name_opt_impl(self) -> tuple[str, str]:
        return "trtq's INT8 model, simulated on the CPU", "trtq-int8"

    def add_to_script_impl(self, script: Script) -> None:
        script.add_import(["OnnxrtRunner"], frm="polygraphy.backend.onnxrt")
        script.add_import(["SimulationFromOnnxBytes"], frm="trtq_polygraphy.loaders")
        model = self.arg_groups[Int8ModelArgs].add_to_script(script)
        session = script.add_loader(make_invocable("SimulationFromOnnxBytes", model), "simulate_int8")
        script.add_runner(make_invocable("OnnxrtRunner", session, name="trtq-int8-simulation"))


class EngineRunnerArgs(BaseRunnerArgs):
    """
    trtq INT8 Engine: running an engine of the INT8 model of trtq.

    Depends on:

        - Int8ModelArgs
        - TrtLoadPluginsArgs
        - TrtLoadEngineArgs
        - TrtRunnerArgs
    """

    def get_name_opt_impl(self) -> tuple[str, str]:
        return "an engine of trtq's INT8 model", "trtq-engine"

    def get_extra_help_text_impl(self) -> str:
        return (
            "Needs a GPU, and TensorRT from 10.0, or TensorRT-RTX with POLYGRAPHY_USE_TENSORRT_RTX=1. "
            "Options of --trt about the engine apply."
        )

    def add_to_script_impl(self, script: Script) -> None:
        if config.USE_TENSORRT_RTX:  # the script may run where POLYGRAPHY_USE_TENSORRT_RTX is not set
            script.append_preimport(safe("from polygraphy import config"))
            script.append_preimport(safe("config.USE_TENSORRT_RTX = True"))
        script.add_import(["NetworkFromOnnxBytes", "TrtRunner"], frm="polygraphy.backend.trt")
        model = self.arg_groups[Int8ModelArgs].add_to_script(script, allow_custom_outputs=False)
        model = self.arg_groups[TrtLoadPluginsArgs].add_to_script(script, model)
        network = script.add_loader(
            make_invocable("NetworkFromOnnxBytes", model, strongly_typed=True), "parse_int8_network"
        )
        engine = self.arg_groups[TrtLoadEngineArgs].add_to_script(script, network)
        script.add_runner(
            make_invocable(
                "TrtRunner",
                engine,
                name="trtq-int8-engine",
                optimization_profile=self.arg_groups[TrtRunnerArgs].optimization_profile,
            )
        )
