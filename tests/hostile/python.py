"""What a Python program may give by mistake, or to harm: data, models and options of every wrong kind."""

from __future__ import annotations

import collections
import contextlib
import datetime
import gc
import io
import itertools
import os
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from decimal import Decimal
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from hostile.inputs import X, write_suitable
from hostile.trial import MOST_SECONDS
from jobs import inside

import trtq

Attempt = Callable[[], object]


class _Empty:
    """An iterator that says that it has -1 items."""

    def __len__(self) -> int:
        return -1

    def __iter__(self) -> _Empty:
        return self

    def __next__(self) -> Any:
        raise StopIteration


class _NoLength:
    def __len__(self) -> int:
        raise ZeroDivisionError

    def __getitem__(self, index: int) -> Any:
        raise IndexError


class _LongerThanItIs:
    def __init__(self, row: Any) -> None:
        self._row = row

    def __len__(self) -> int:
        return 2**62

    def __getitem__(self, index: int) -> Any:
        if index > 4:
            raise IndexError
        return {X: self._row}


class _NoText:
    def __repr__(self) -> str:
        raise RuntimeError("no text")


class _NoArray:
    shape = (24, 4)

    def __array__(self, *given: Any, **options: Any) -> Any:
        raise ValueError("no array")


class _OtherArray:
    shape = (24, 4)

    def __array__(self, *given: Any, **options: Any) -> Any:
        return np.zeros(3, object)


class _NoError(BaseException):
    pass


def _then(row: Any, error: BaseException) -> Callable[[], Iterator[Any]]:
    """A generator that raises behind a row."""

    def give() -> Iterator[Any]:
        yield {X: row}
        raise error

    return give


def _leaving(row: Any) -> Iterator[Any]:
    yield {X: row}
    os._exit(0)


def data(rows: np.ndarray, labels: np.ndarray) -> Iterator[tuple[str, Any]]:
    """Name and value of what no job can take."""
    row = rows[0]
    yield from (
        (f"a {type(value).__name__} {str(value)[:20]!r}", value)
        for value in (0, 1.5, True, b"x", "", "no.npz", object, 1j, Path("no"), Path("/dev/zero"), np)
    )
    yield from {
        "an empty list": [],
        "an empty tuple": (),
        "an empty dict": {},
        "an empty set": set(),
        "an empty iterator": iter([]),
        "an iterator of no length": _Empty(),
        "a length that fails": _NoLength(),
        "a length that lies": _LongerThanItIs(row),
        "no text": _NoText(),
        "no array": _NoArray(),
        "another array": _OtherArray(),
        "a function of an argument": lambda x: x,
        "a function of nothing": lambda: None,
        "a function of a number": lambda: 5,
        "a function that fails": lambda: 1 / 0,
        "an error behind a row": _then(row, RuntimeError("in the middle")),
        "an exit behind a row": _then(row, SystemExit(0)),
        "no error behind a row": _then(row, _NoError("base")),
        "the same of a generator": _then(row, _NoError("base"))(),
        "a StopIteration behind a row": _then(row, StopIteration()),
        "an end of the process behind a row": _leaving(row),
        "the same of a function": partial(_leaving, row),
        "rows of other lengths": [{X: row}, {X: row[:3]}],
        "rows of other names": [{X: row}, {"z": row}],
        "rows of other dtypes": [{X: row}, {X: row.astype(int)}],
        "labels of some batches": [(rows[:4], labels[:4]), (rows[:4],)],
        "a row that is None": [{X: row}, None],
        "a row of nothing": [{X: row}, {}],
        "a list that is in itself": _in_itself(),
        "no rows": rows[:0],
        "no columns": rows[:, :0],
        "more columns": np.zeros((24, 5), np.float32),
        "columns as rows": rows.T,
        "complex numbers": rows.astype(complex),
        "objects": rows.astype(object),
        "text": np.array("x"),
        "texts": np.array([["a"] * 4]),
        "dates": rows.astype("M8[s]"),
        "a date": {X: datetime.datetime(2026, 1, 1)},
        "records": np.zeros(24, [("a", "f4")]),
        "masked values": np.ma.masked_array(rows, mask=rows > 0),
        "masked values of a row": [{X: np.ma.masked_array(row, mask=[0, 1, 0, 0])}],
        "not numbers": {X: np.full((24, 4), np.nan, np.float32)},
        "infinite numbers": {X: np.full((24, 4), np.inf, np.float32)},
        "beyond float32": {X: np.full((24, 4), 1e300)},
        "decimal numbers": {X: [[Decimal(1)] * 4] * 3},
        "numbers as text": {X: [["1"] * 4] * 3},
        "bytes": bytearray(rows.tobytes()),
        "None by name": {X: None},
        "nothing by name": {X: []},
        "a dict by name": {X: {X: rows}},
        "an iterator by name": {X: iter(rows)},
        "rows by name of other lengths": {X: [row, row[:2]]},
        "labels that are None": {X: rows, "labels": None},
        "fewer labels": {X: rows, "labels": labels[:5]},
        "another name": {"other": rows},
        "a name that is None": {None: rows},
        "a name that is an escape sequence": {"\x1b[31m": rows},
        "too many arrays": (rows, labels, labels, labels),
        "300 arrays": [tuple([row] * 300)],
        "texts in a tuple": (rows, "labels"),
        "None in a tuple": (None, None),
        "an empty dict that makes its values": collections.defaultdict(list),
        "a range": range(5),
    }.items()


def _in_itself() -> list[Any]:
    made: list[Any] = []
    made.append(made)
    return made


def models() -> dict[str, Any]:
    """What is no model."""
    return {
        "nothing": "",
        "a missing file": "no.onnx",
        "NUL": "m.onnx\0",
        "5,000 characters": "m" * 5000,
        "no bytes": b"",
        "bytes": b"x" * 100,
        "a number": 5,
        "a list": [],
        "a dict": {},
        "an object": object(),
        "a type": int,
        "a function": lambda: 1,
        "no text": _NoText(),
        "no array": _NoArray(),
        "a folder": Path("."),
        "data": Path("d.npz"),
        "a device": Path("/dev/zero"),
        "an empty ModelProto": onnx.ModelProto(),
        "a GraphProto": onnx.GraphProto(),
    }


OPTIONS: dict[str, tuple[Any, ...]] = {
    "method": (0, "", "nope", b"max", [], {}, "max\0", 1e999, _NoText()),
    "batch": (0, -1, "x", 1e99, 10**30, [], float("nan"), _NoText()),
    "threads": (0, -1, "x", 1e99, 10**30, [], 1.5),
    "max_drop": (-1, "x", float("nan"), 1e999, [], 10**400),
    "confidence": (-1, "x", float("nan"), 2, [], 10**400),
    "exclude": (5, [5], [None], _NoText()),
    "include": (5, [5], [None], _NoText()),
    "output": (5, "", [], "m.onnx", "d.npz", "/dev/null/x", "a\0"),
    "plan": (5, "nope", [], _NoText()),
    "state": (5, "x", {"a": 1}, {X: "z"}),
    "inputs": (5, {X: 5}, {X: {"batch_axis": 9}}, {"z": {}}),
    "preprocess": (5, {X: 5}, {X: {"scale": "x"}}, {X: {"scale": float("nan")}}),
    "recover": (5, "x", ["x"]),
    "budget": (5j, -1, "x", float("nan")),
    "recipe": (5, {}, "no.toml", [], b"x", _NoText()),
    "cache": (5, "m.onnx", "", []),
    "profile": (5, "x", {X: "1x4,2x4"}, {X: 5}),
    "labels": (5, "nope", []),
    "op_reference": (5, "nope.py", [5]),
}
"""Option -> values that no step takes."""

METRICS: tuple[Any, ...] = (
    *(5, "", "nope", [], type, _NoText()),
    *(
        lambda: 1,
        lambda *given: "x",
        lambda *given: 10**400,
        lambda *given: np.zeros(5),
        lambda *given: 1 / 0,
    ),
)


def attempts() -> Iterator[tuple[str, Callable[[Path], list[str]]]]:
    """Name, and the try: each has to raise one of trtq's errors, or a TypeError of the call itself."""
    rows, labels = np.zeros((24, 4), np.float32), np.zeros(24, np.int64)
    for name, _ in data(rows, labels):
        yield f"data: {name}", partial(_with_data, name)
    for name, value in models().items():
        for step in ("calibrate", "build", "gate"):
            yield f"model of {step}: {name}", partial(_faults, partial(_of_model, step, value))
    for option, values in OPTIONS.items():
        for (number, value), step in itertools.product(enumerate(values), ("calibrate", "deploy")):
            yield f"{option} of {step}: {number}", partial(_faults, partial(_of_option, step, option, value))
    for number, metric in enumerate(METRICS):
        yield f"metric: {number}", partial(_faults, partial(_of_option, "deploy", "metric", metric))


def _of_model(step: str, model: Any) -> object:
    if step == "gate":
        return trtq.gate("m.onnx", model, eval="d.npz", metric="cosine")
    if step == "build":
        return trtq.build(model, output="out.plan")
    return trtq.calibrate(model, data="d.npz", method="max")


def _of_option(step: str, option: str, value: Any) -> object:
    options: dict[str, Any] = {"data": "d.npz", "method": "max"}
    if step == "deploy":
        options |= {"eval": "d.npz", "metric": "top1", "backend": "none", "recover": "none", "output": "out"}
    return getattr(trtq, step)("m.onnx", **(options | {option: value}))


def _with_data(name: str, folder: Path) -> list[str]:
    def attempt() -> object:
        with np.load("d.npz") as stored:
            given = dict(data(stored[X], stored["labels"]))[name]
        return trtq.calibrate("m.onnx", data=given, method="max")

    return _faults(attempt, folder)


def _faults(attempt: Attempt, folder: Path) -> list[str]:
    """What a call does beside raising an error of trtq's, of which the first line says what is wrong."""
    write_suitable(folder)
    inputs = {path: path.read_bytes() for path in folder.iterdir()}
    quiet, started, found = io.StringIO(), time.process_time(), []
    with inside(folder), warnings.catch_warnings(), contextlib.redirect_stderr(quiet):
        warnings.simplefilter("ignore")
        try:
            found.append(f"it gives a {type(attempt()).__name__}")
        except trtq.TrtqError as error:
            if not str(error).isascii() and "\x1b" in str(error):
                found.append("a message that a terminal obeys")
        except TypeError as error:
            if traceback.extract_tb(error.__traceback__)[-1].filename != trtq.api.__file__:
                found.append(f"a TypeError from inside: {error}")
        except BaseException as error:
            found.append(f"{type(error).__name__}: {error}")
    if time.process_time() - started > MOST_SECONDS:
        found.append("it takes too long")
    gc.collect()  # what an error's frames hold goes with them, and scratch files with it
    found += [f"{path.name} changed" for path, content in inputs.items() if path.read_bytes() != content]
    return found
