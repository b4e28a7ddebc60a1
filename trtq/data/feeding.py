"""What a recipe says of a model's inputs beside preprocessing: batch axes, constants, states."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trtq.errors import InputError, shown
from trtq.graph.inputs import InputSpec, dims_text, fits

OPTIONS = ("batch_axis", "value")
NO_AXIS = "none"


@dataclass(frozen=True)
class InputOptions:
    """`[inputs.<input>]` of a recipe.

    - `batch_axis`: the axis of the input that is the batch, from 0, or "none": a sample's value is fed as it
      stands. Where it is 1, say, an array of the input's rank holds the samples along its axis 1.
    - `value`: what the input always is, where the data have no array for it: a number, or nested lists.
    """

    name: str
    options: Mapping[str, Any]

    @classmethod
    def parse(cls, name: str, options: Any) -> InputOptions:
        """Check the options of `[inputs.<name>]`.

        Raises:
            InputError: an unknown option, or a value that is not valid.
        """
        if not isinstance(options, Mapping) or not options or set(options) - set(OPTIONS):
            raise InputError(f"inputs.{name} is {shown(options)}", remedy=f"use {' or '.join(OPTIONS)}")
        axis = options.get("batch_axis", NO_AXIS)
        if axis != NO_AXIS and (type(axis) is not int or axis < 0):
            raise InputError(
                f"inputs.{name}.batch_axis is {shown(axis)}", remedy=f'use an axis from 0, or "{NO_AXIS}"'
            )
        if "value" in options:
            try:
                numbers = np.asarray(options["value"]).dtype.kind in "biuf"
            except (ValueError, OverflowError):  # rows of different lengths, or integers beyond any
                numbers = False
            if not numbers:
                raise InputError(f"inputs.{name}.value holds no numbers", remedy="use a number, or lists")
        return cls(name, dict(options))

    @property
    def axis(self) -> tuple[int | None] | None:
        """The batch axis that is given, None for "none", in a tuple; None where nothing is said."""
        if "batch_axis" not in self.options:
            return None
        axis = self.options["batch_axis"]
        return (None if axis == NO_AXIS else axis,)


@dataclass(frozen=True)
class Feeding:
    """What a recipe says of the inputs beside preprocessing.

    Attributes:
        inputs: input -> its options.
        state: input -> the output that it is at the next row (`[state]`).
        classes: class name -> class number, of labels that the data have as text (`classes`); empty: the
            names are numbered in the order of the alphabet, as torchvision's `ImageFolder` does it.
    """

    inputs: Mapping[str, InputOptions] = field(default_factory=dict)
    state: Mapping[str, str] = field(default_factory=dict)
    classes: Mapping[str, int] = field(default_factory=dict)

    def specs(self, inputs: Sequence[InputSpec]) -> tuple[InputSpec, ...]:
        """The inputs with the batch axes that the recipe gives.

        Raises:
            InputError: it names no input of the model, or an axis that the input does not have.
        """
        names = [spec.name for spec in inputs]
        for table, named in (("inputs", self.inputs), ("state", self.state)):
            if unknown := [name for name in named if name not in names]:
                raise InputError(
                    f"[{table}] names '{unknown[0]}', which is no input of the model",
                    remedy=f"the inputs are {', '.join(names)}",
                )
        return tuple(self._spec(spec) for spec in inputs)

    def decides(self, name: str) -> bool:
        """Whether the recipe gives an input's batch axis."""
        return name in self.inputs and self.inputs[name].axis is not None

    def constants(self, specs: Sequence[InputSpec]) -> dict[str, NDArray]:
        """Input -> the value that the recipe gives it.

        Raises:
            InputError: the value does not suit the input.
        """
        found = {}
        for spec in specs:
            if spec.name not in self.inputs or "value" not in self.inputs[spec.name].options:
                continue
            given = np.asarray(self.inputs[spec.name].options["value"])
            value = given.astype(spec.dtype)
            if not fits(spec.shape, value.shape) or not np.array_equal(given, value.astype(given.dtype)):
                raise InputError(
                    f"inputs.{spec.name}.value is {given.dtype} of shape {dims_text(given.shape)};"
                    f" the model takes {spec}"
                )
            found[spec.name] = value
        return found

    def _spec(self, spec: InputSpec) -> InputSpec:
        if not self.decides(spec.name):
            return spec
        (axis,) = self.inputs[spec.name].axis or (None,)
        if axis is not None and axis >= len(spec.shape):
            raise InputError(f"inputs.{spec.name}.batch_axis is {axis}; the model takes {spec}")
        return spec._replace(batch_axis=axis)


NO_FEEDING = Feeding()
