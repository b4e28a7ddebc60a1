"""Hostile inputs of every kind that a command reads, each with the command that has to refuse it.

Every case has to end with exit code 2, one message, no traceback, and nothing written. Where cases are
random, they come from a seed, and a run can be as long as there is time for.
"""

from __future__ import annotations

import io
import itertools
import os
import random
import shutil
import socket
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
from jobs import inside

from trtq.escapes import printable

X = "suitable"
"""Name of the array and input that the model takes."""

Make = Callable[[Path], object]


@dataclass(frozen=True)
class Hostile:
    """One case.

    Attributes:
        name: unique.
        arguments: of the command line; relative paths are in the folder that `make` filled.
        make: writes the hostile files into a folder that has `write_suitable`'s.
    """

    name: str
    arguments: tuple[str, ...]
    make: Make = lambda folder: None


def write_suitable(folder: Path) -> None:
    """A model `m.onnx`, data for it `d.npz`, a metric `metric.py:good` and a table `t.cache`."""
    model = onnx.parser.parse_model(
        f"""<ir_version: 8, opset_import: ["": 17]>
        g (float[N,4] {X}) => (float[N,3] y) {{ y = MatMul({X}, w) }}"""
    )
    weights = np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32)
    model.graph.initializer.append(onnx.numpy_helper.from_array(weights, "w"))
    onnx.save(model, folder / "m.onnx")
    rows = np.random.default_rng(1).normal(size=(24, 4)).astype(np.float32)
    np.savez(folder / "d.npz", **{X: rows, "labels": (rows @ weights).argmax(axis=1)})
    (folder / "metric.py").write_text("def good(outputs, targets):\n    return 0.5\n")
    (folder / "t.cache").write_text(f"TRT-101601-EntropyCalibration2\n{X}: 3c010204\n")


def all_cases(seed: int = 0, scale: int = 1) -> Iterator[Hostile]:
    """Every case; `scale` times as many where they are random."""
    source = random.Random(seed)
    yield from outputs()
    yield from archives(source, 60 * scale)
    yield from images(source, 3 * scale)
    yield from scripts()
    yield from recipes(source, 60 * scale)
    yield from options()
    yield from files()
    yield from tables()
    yield from profiles()


def calibrate(*more: str) -> tuple[str, ...]:
    """`calibrate` of the model; of an option that is given twice the last one counts."""
    return ("calibrate", "m.onnx", "-o", "out.cache", "--method", "max", "--data", "d.npz", *more)


def gate(*more: str) -> tuple[str, ...]:
    """`gate` of the model against itself; of an option that is given twice the last one counts."""
    return ("gate", "m.onnx", "m.onnx", "--eval", "d.npz", "--metric", "cosine", *more)


def writes(name: str, content: bytes | str, *also: Make) -> Make:
    """Write a file, and what else there is to write."""

    def make(folder: Path) -> None:
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        for other in also:
            other(folder)

    return make


# --- outputs over inputs ------------------------------------------------------------------------------


def outputs() -> Iterator[Hostile]:
    """Outputs that would replace an input, one another, a folder, or something that is no file."""

    def make(folder: Path) -> None:
        (folder / "here").symlink_to(".")
        (folder / "link2.onnx").symlink_to("link.onnx")
        (folder / "t.cache.json").write_text("{}")
        model = onnx.load(folder / "m.onnx")
        onnx.save(model, folder / "e.onnx", save_as_external_data=True, location="e.data", size_threshold=0)
        (folder / "link.onnx").symlink_to("m.onnx")
        os.link(folder / "m.onnx", folder / "hard.onnx")
        os.mkfifo(folder / "pipe")
        (folder / "folder").mkdir()
        (folder / "model.int8.onnx").write_bytes((folder / "m.onnx").read_bytes())
        (folder / "r.toml").write_text("method = 'max'")

    data = ("m.onnx", "--data", "d.npz", "--method", "max")
    inputs = (
        "m.onnx",
        "./m.onnx",
        "folder/../m.onnx",
        "here/here/m.onnx",
        "d.npz",
        "link2.onnx",
        "hard.onnx",
    )
    no_files = ("folder", "d.npz/x", "/proc/x", "/sys/x", "/dev/new", "/proc/sys/kernel/hostname")
    for path in (*inputs, *no_files, "pipe", "/dev/stdout", "/dev/null"):
        yield Hostile(f"quantize -o {path}", ("quantize", *data, "-o", path), make)
    for path in ("t.cache", "m.onnx", "link.onnx"):
        for command in ("quantize", "build", "migrate"):
            arguments = (command, "m.onnx", "--table", "t.cache", "-o", path)
            yield Hostile(f"{command} --table -o {path}", arguments, make)
    for path in (*inputs, *no_files):
        yield Hostile(f"calibrate -o {path}", calibrate("-o", path), make)
        yield Hostile(f"sensitivity -o {path}", ("sensitivity", *data, "-o", path), make)
        for option in ("--json", "--junit", "--tensors"):
            yield Hostile(f"gate {option} {path}", gate(option, path), make)
    for one, other in itertools.combinations(("--json", "--junit", "--tensors"), 2):
        yield Hostile(f"gate {one} {other}", gate(one, "v", other, "./v"), make)
    judged = ("--data", "d.npz", "--eval", "d.npz", "--metric", "cosine")
    for path in ("m.onnx", "pipe", "/dev/stdout", "/dev/null", "d.npz/x", "/sys/x"):
        yield Hostile(f"deploy -o {path}", ("deploy", "m.onnx", *judged, "-o", path), make)
        yield Hostile(f"study -o {path}", ("study", "m.onnx", *judged, "-o", path), make)
        yield Hostile(f"demo -o {path}", ("demo", "-o", path), make)
    for path in ("/dev/fd/1", "/proc/self/fd/1", "/dev/fd/99", "/dev/stderr", "/dev/full", "a/" * 3000):
        yield Hostile(f"quantize -o {path[:20]}", ("quantize", *data, "-o", path), make)
    for path in ("/dev/full", "/dev/fd/99", "a/" * 3000):
        yield Hostile(f"gate --json {path[:20]}", gate("--json", path), make)
    beside = ("quantize", "m.onnx", "--table", "t.cache", "-o", "t.cache.json")
    yield Hostile("quantize over what lies beside a table", beside, make)
    beside = ("cache", "convert", "t.cache", "-o", "t.cache.json")
    yield Hostile("convert over what lies beside a table", beside, make)
    yield Hostile("quantize over weights", ("quantize", "e.onnx", *data[1:], "-o", "e.data"), make)
    yield Hostile("quantize, its weights over weights", ("quantize", "e.onnx", *data[1:], "-o", "e"), make)
    yield Hostile("gate over its metric", gate("--metric", "metric.py:good", "--json", "metric.py"), make)
    yield Hostile(
        "deploy over its model by a link", ("deploy", "model.int8.onnx", *judged, "-o", "here"), make
    )
    yield Hostile("deploy over its model", ("deploy", "model.int8.onnx", *judged, "-o", "."), make)
    yield Hostile("table over table", ("cache", "convert", "t.cache", "-o", "t.cache"), make)
    yield Hostile("bench over engine", ("bench", "m.onnx", "--json", "m.onnx"), make)
    yield Hostile("table over recipe", calibrate("--recipe", "r.toml", "-o", "r.toml"), make)
    yield Hostile("metadata over recipe", calibrate("--recipe", "r.json", "-o", "r"), writes("r.json", ""))


# --- .npz that lie ------------------------------------------------------------------------------------


def npy(shape: str, body: bytes, dtype: str = "'<f4'") -> bytes:
    """A `.npy` whose header may claim anything."""
    header = f"{{'descr': {dtype}, 'fortran_order': False, 'shape': {shape}, }}".encode()
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + body


def npz(members: dict[str, bytes], method: int = zipfile.ZIP_STORED) -> bytes:
    """An `.npz` of members that may be anything."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return buffer.getvalue()


WHOLE = {
    *("no rows", "no shape", "complex", "dates", "texts", "wrong columns", "not a number", "infinity"),
    *("no members", "other name", "fewer targets"),
    *("a name from the root", "a name from above", "an empty name", "arrays of a half"),
}
"""Archives whose bytes are what they say, of arrays that no job can use: `inspect` describes them."""


def archives(source: random.Random, damaged: int) -> Iterator[Hostile]:
    """Data files whose headers and bytes disagree, or that hold something else than arrays."""
    for name, content in {**_lies(), **_odd_archives()}.items():
        bad = writes("bad.npz", content)
        yield Hostile(f"npz: {name}", calibrate("--data", "bad.npz"), bad)
        yield Hostile(f"npz of eval: {name}", gate("--eval", "bad.npz"), bad)
        if name.partition(",")[0] not in WHOLE:
            yield Hostile(f"npz inspected: {name}", ("inspect", "bad.npz"), bad)
        in_folder = writes("bad/a.npz", content)
        yield Hostile(f"npz in a folder: {name}", calibrate("--data", "bad"), in_folder)
    whole = npz({f"{X}.npy": npy("(24, 4)", _rows())})
    described = whole.index(b"<f4")
    for number in range(damaged):
        cut = whole[: source.randrange(len(whole) - 22)]  # without the end of the directory
        yield Hostile(f"npz cut {number}", calibrate("--data", "bad.npz"), writes("bad.npz", cut))
        spoilt = bytearray(whole)
        spoilt[described + number % 3] ^= 1 << source.randrange(8)
        yield Hostile(
            f"npz spoilt {number}", calibrate("--data", "bad.npz"), writes("bad.npz", bytes(spoilt))
        )


def _rows() -> bytes:
    """The values of 24 rows."""
    return np.random.default_rng(1).normal(size=(24, 4)).astype(np.float32).tobytes()


def _lies() -> dict[str, bytes]:
    """Archives of one array that is not what its header says, or that no model takes."""
    rows, large = _rows(), bytes(17 << 20)  # large: stays in the file and is read row by row
    arrays = {
        "more rows": npy("(25, 4)", rows),
        "fewer rows": npy("(23, 4)", rows),
        "10^9 rows": npy("(1000000000, 4)", rows),
        "10^30 rows": npy(f"({10**30}, 4)", rows),
        "no rows": npy("(0, 4)", b""),
        "10^9 rows of nothing": npy("(1000000000, 0)", b""),
        "negative rows": npy("(-24, 4)", rows),
        "negative rows and columns": npy("(-24, -4)", rows),
        "no shape": npy("()", rows[:4]),
        "shape of text": npy("('24', 4)", rows),
        "shape of a call": npy("(__import__('os'), 4)", rows),
        "S0": npy("(1000000000,)", b"", "'|S0'"),
        "V0": npy("(24, 4)", b"", "'|V0'"),
        "U0": npy("(24, 4)", b"", "'<U0'"),
        "records": npy("(24,)", rows, "[('a', '<f8'), ('b', '<f8')]"),
        "objects": npy("(1,)", b"\x80\x04N.", "'|O'"),
        "unknown type": npy("(24, 4)", rows, "'<q9'"),
        "complex": npy("(12, 4)", rows, "'<c8'"),
        "dates": npy("(12, 4)", rows, "'<M8[s]'"),
        "texts": npy("(24, 4)", rows, "'<U1'"),
        "empty": b"",
        "only magic": b"\x93NUMPY",
        "version 9": b"\x93NUMPY\x09" + npy("(24, 4)", rows)[7:],
        "long header": npy("(24, 4)" + " " * 20000, rows),
        "deep header": npy("(" * 5000 + ")" * 5000, rows),
        "text": b"no array at all",
        "pickle": b"\x80\x04\x8c\x02os\x94.",
        "wrong columns": npy("(12, 8)", rows),
        "not a number": npy("(6, 4)", struct.pack("<f", np.nan) * 24),
        "infinity": npy("(6, 4)", struct.pack("<f", np.inf) * 24),
        "large, more rows": npy(f"({2 << 20}, 4)", large),
        "large, a byte short": npy(f"({17 << 16}, 4)", large[:-1]),
    }
    names = {zipfile.ZIP_STORED: "stored", zipfile.ZIP_DEFLATED: "deflated"}
    return {f"{n}, {names[m]}": npz({f"{X}.npy": a}, m) for n, a in arrays.items() for m in names}


def _odd_archives() -> dict[str, bytes]:
    rows = npy("(24, 4)", _rows())
    good = npz({f"{X}.npy": rows})
    return {
        "no zip": b"PK\x03\x04 and nothing more",
        "empty file": b"",
        "npy": rows,
        "no members": npz({}),
        "text beside": npz({f"{X}.npy": rows, "README.txt": b"hello"}),
        "the name twice": npz({f"{X}.npy": rows, X: rows}),
        "other name": npz({"other.npy": rows}),
        "fewer targets": npz({f"{X}.npy": rows, "labels.npy": npy("(7,)", _rows()[:28])}),
        "encrypted": _changed(good, {6: b"\1"}, {8: b"\1"}),
        "compressed by no known method": _changed(good, {8: b"\x63"}, {10: b"\x63"}),
        "compressed by LZMA, it says": _changed(good, {8: b"\x0e"}, {10: b"\x0e"}),
        "a member behind the end": _changed(good, {}, {42: struct.pack("<I", 1 << 31)}),
        "a folder": npz({f"{X}/": b""}),
        "a folder beside": npz({f"{X}.npy": rows, "labels/": b""}),
        "a name from the root": npz({f"/{X}.npy": rows}),
        "a name from above": npz({f"../../{X}.npy": rows}),
        "an empty name": npz({".npy": rows}),
        "70 kB of comment": good + bytes(70000),
        "arrays of a half": npz({f"{X}.npy": npy("(48, 4)", _rows(), "'<f2'")}),
        "a list as dtype": npz({f"{X}.npy": npy("(24, 4)", _rows(), "['<f4']")}),
        "a dict as dtype": npz({f"{X}.npy": npy("(24, 4)", _rows(), "{'names': [], 'formats': []}")}),
        "arrays as values": npz({f"{X}.npy": npy("(24,)", _rows(), "('<f4', (4,))")}),
        "a tuple in the shape": npz({f"{X}.npy": npy("(24, (4,))", _rows())}),
        "a fraction in the shape": npz({f"{X}.npy": npy("(24.0, 4)", _rows())}),
        "wrong checksum": good.replace(struct.pack("<I", zlib.crc32(rows)), b"\0\0\0\0"),
        "bomb": _bomb(),
    }


def _changed(archive: bytes, member: dict[int, bytes], entry: dict[int, bytes]) -> bytes:
    """An archive of one member with other bytes at offsets of its header, and of its entry in the
    directory."""
    changed = bytearray(archive)
    for start, changes in ((0, member), (archive.rindex(b"PK\1\2"), entry)):
        for offset, new in changes.items():
            changed[start + offset : start + offset + len(new)] = new
    return bytes(changed)


def _bomb() -> bytes:
    """Five arrays of 1 GiB, of which the archive has some kilobytes."""
    arrays = {f"{index}.npy": npy(f"({1 << 18}, 1024)", bytes(1 << 16)) for index in range(5)}
    length = len(next(iter(arrays.values())))
    claimed = length - (1 << 16) + (1 << 30)
    content = npz(arrays, zipfile.ZIP_DEFLATED)
    return content.replace(struct.pack("<I", length), struct.pack("<I", claimed))


# --- images -------------------------------------------------------------------------------------------

_IMAGES = f"[preprocess.{X}]\nscale = '1/255'\nresize = [2, 2]\n"


def images(source: random.Random, damaged: int) -> Iterator[Hostile]:
    """Files named as images that are something else, damaged, or far larger than they look; and lists."""
    for name, content in {**_no_images(), **_damaged_images(source, damaged)}.items():
        make = writes("bad/a.png", content, writes("r.toml", _IMAGES))
        yield Hostile(f"image: {name}", calibrate("--data", "bad", "--recipe", "r.toml"), make)
    lists = {
        "folder": "file\n.\n",
        "device": "file\n/dev/zero\n",
        "NUL": "file\na\0.png\n",
        "none": "file\n",
        "no file": "name\na.png\n",
        "missing": "file\nmissing.png\n",
        "long": "file\n" + "a" * 10**5 + ".png\n",
        "field": 'file\n"' + "a" * 10**6 + '"\n',
    }
    for name, text in lists.items():
        make = writes("bad.csv", text, writes("r.toml", _IMAGES))
        yield Hostile(f"csv: {name}", calibrate("--data", "bad.csv", "--recipe", "r.toml"), make)


def _no_images() -> dict[str, bytes]:
    huge = struct.pack("<IHHIIiiHHIIiiII", 60, 0, 0, 54, 40, 10**9, 10**9, 1, 24, 0, 0, 0, 0, 0, 0)
    return {
        "EPS": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n(hacked) (w) file\n",
        "binary EPS": b"\xc5\xd0\xd3\xc6"
        + struct.pack("<7I", 32, 60, 0, 0, 0, 0, 0)
        + b"%!PS-Adobe-3.0 EPSF",
        "PDF": b"%PDF-1.4\n1 0 obj\n",
        "SVG": b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        "WMF": b"\xd7\xcd\xc6\x9a" + bytes(40),
        "script": b"#!/bin/sh\ntouch hacked\n",
        "empty": b"",
        "PPM of 4 gigapixels": b"P6 65535 65535 255\n",
        "PPM of 10^18 pixels": b"P6 1000000000 1000000000 255\n",
        "PNG of 4 gigapixels": _png(65535, 65535),
        "PNG of 150 megapixels": _png(15000, 10000),
        "PNG of nothing": _png(0, 0),
        "PNG with a text bomb": _png(8, 8, _chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(1 << 26), 1))),
        "BMP of 10^18 pixels": b"BM" + huge,
        "FITS": b"SIMPLE  =                    T" + b" " * 2850,
    }


def _damaged_images(source: random.Random, many: int) -> dict[str, bytes]:
    from PIL import Image

    found = {}
    for kind in ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM"):
        buffer = io.BytesIO()
        Image.fromarray(np.arange(192, dtype=np.uint8).reshape(8, 8, 3)).save(buffer, kind)
        found[f"{kind} cut"] = buffer.getvalue()[: len(buffer.getvalue()) // 3]
        for number in range(many):
            found[f"{kind} of another start {number}"] = source.randbytes(4) + buffer.getvalue()[4:]
    return found


def _chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def _png(width: int, height: int, *chunks: bytes) -> bytes:
    size = _chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    data = _chunk(b"IDAT", zlib.compress(bytes(1 << 16)))
    return b"\x89PNG\r\n\x1a\n" + size + b"".join(chunks) + data + _chunk(b"IEND", b"")


# --- scripts ------------------------------------------------------------------------------------------

_RETURNED = (
    *("float('inf')", "-float('inf')", "float('nan')", "10**400", "-10**400", "'high'", "None", "[]", "{}"),
    *("1j", "[1, 2]", "[[1.0] * 24]", "object()", "b'1'", "[0.5] * 23", "[float('inf')] * 24", "lambda: 1"),
    *("__import__('numpy').zeros((24, 24))", "__import__('numpy').zeros(24, 'M8[s]')", "[10**400] * 24"),
    *("__import__('os')._exit(0)", "__import__('sys').exit(0)", "1 / 0", "(_ for _ in ())"),
    *("__import__('fractions').Fraction(1, 2)", "[0.5] * 10 ** 6"),
)


def scripts() -> Iterator[Hostile]:
    """Metrics, data scripts and operator references that give something else than they should, or end the
    process."""
    for value in _RETURNED:
        bad = writes("bad.py", f"def good(*given):\n    return {value}\n")
        yield Hostile(f"metric: {value}", gate("--metric", "bad.py:good"), bad)
        yield Hostile(f"data: {value}", calibrate("--data", "bad.py:good"), bad)
        bad = writes("bad.py", f"REFERENCES = {value}\n")
        yield Hostile(f"reference: {value}", calibrate("--op-reference", "bad.py"), bad)
    for value in (
        "good(*given)",
        "given[0].clear() or given[0]['y']",
        "given[0]['y'].fill(0) or 1",
        "given[5]",
    ):
        bad = writes("bad.py", f"def good(*given):\n    return {value}\n")
        yield Hostile(f"metric: {value}", gate("--metric", "bad.py:good"), bad)
    texts = {
        "leaves": b"import os\nos._exit(0)\n",
        "exits": b"raise SystemExit(0)\n",
        "fails": b"1 / 0\n",
        "NUL": b"\0",
        "no Python": b"def (",
        "nothing": b"",
        "bytes": b"\xff\xfe\xff",
        "deep": b"(" * 10**5,
        "endless": b"def f(): return f()\nf()\n",
        "no error": b"class E(BaseException): pass\nraise E\n",
        "an error that cannot be shown": b"class E(Exception):\n def __str__(self): return 1 / 0\nraise E\n",
        "an error of 10 MB": b"raise ValueError('x' * 10 ** 7)\n",
        "an escape sequence": b"raise ValueError('\\x1b]0;owned\\x07')\n",
    }
    for name, text in texts.items():
        bad = writes("bad.py", text)
        yield Hostile(f"metric script: {name}", gate("--metric", "bad.py:good"), bad)
        yield Hostile(f"data script: {name}", calibrate("--data", "bad.py:good"), bad)
        yield Hostile(f"reference script: {name}", calibrate("--op-reference", "bad.py"), bad)
    for spec in (
        "missing.py:good",
        "metric.py:bad",
        "metric.py:",
        ":good",
        "nope",
        "top1@z",
        "top1@y:z",
        "top9",
    ):
        yield Hostile(f"metric named {spec}", gate("--metric", spec))


# --- recipes ------------------------------------------------------------------------------------------

_VALUES = (
    *("''", '"a\\u0000b"', "1e999999999", "-1e999999999", "'1e999999999'", "nan", "inf", "-inf", "-1"),
    *("9" * 4000, "9" * 5000, f"0x{'f' * 5000}", "[[[[1]]]]", "{a = {b = 1}}", "[1, 'a']", "1979-05-27"),
    *("'1/0'", "'1e400/1e400'", f"'{'9' * 10000}'", "99999999999999999999", "[1e400]", "[nan]"),
)
_KEYS = (
    *(f"[preprocess.{X}]\n{name}" for name in ("scale", "mean", "std", "resize", "crop", "color", "layout")),
    *(f"[inputs.{X}]\nbatch_axis", f"[preprocess]\n{X}", f"[inputs]\n{X}", f"[state]\n{X}"),
    *"""method batch threads profile state budget plan data model rest weights backend workspace max_drop
    confidence min_int8 min_sqnr recover partial_limit""".split(),
)
_PLAIN = {  # what is a number like any other
    *((key, value) for key in ("min_sqnr",) for value in ("-1", "99999999999999999999")),
    *(("budget", value) for value in ("99999999999999999999",)),
    *((key, value) for key in _KEYS if key.endswith("]\nscale") for value in ("-1", "99999999999999999999")),
    *(
        (key, value)
        for key in _KEYS
        if key.endswith(("]\nmean", "]\nstd"))
        for value in ("-1", "99999999999999999999")
    ),
}


def recipes(source: random.Random, mixed: int) -> Iterator[Hostile]:
    """Recipes that are no TOML, too deep, too large, or give options what they do not take."""
    texts: dict[str, bytes | str] = {
        "no key": "= 1",
        "deep": "a = " + "[" * 10**5,
        "deep and closed": "state = " + "[" * 1000 + "]" * 1000,
        "deep table": "state = " + "{a = " * 300 + "1" + "}" * 300,
        "dotted": ".".join("a" * 5000) + " = 1",
        "dotted table": "[" + ".".join("a" * 5000) + "]",
        "dotted option": "inputs." + ".".join("a" * 500) + " = 1",
        "unknown": "method_ = 'max'",
        "twice": "max-drop = 0.1\nmax_drop = 0.1",
        "large": "# " + "x" * (2 << 20),
        "NUL": "method = 'max'\0",
        "not closed": "method = 'max",
        "long number": "batch = " + "9" * 10**6,
        "many keys": "\n".join(f"a{i} = 1" for i in range(20000)),
        "not UTF-8": b"method = '\xff'",
    }
    for name, text in texts.items():
        yield Hostile(f"recipe: {name}", calibrate("--recipe", "r.toml"), writes("r.toml", text))
    given = [(key, value) for key in _KEYS for value in _VALUES if (key, value) not in _PLAIN]
    for key, value in source.sample(given, min(mixed, len(given))):
        name = f"recipe: {key} = {value[:30]} ({len(value)})".replace("\n", " ")
        yield Hostile(name, ("calibrate", "--recipe", "r.toml"), writes("r.toml", f"{key} = {value}"))


# --- options and files --------------------------------------------------------------------------------


def options() -> Iterator[Hostile]:
    """Options of the command line that no command can take."""
    numbers = ("-1", "1e999999999", "nan", "inf", "x", "", "9" * 30, "9" * 5000, "1.5", "0x10", "²")
    build = ("build", "m.onnx", "-o", "out.plan")
    profiles = ("x", "x:", "1", "1x4,2x4", "2x4,1x4,1x4", "0x4", f"{10**30}x4", f"{'9' * 5000}x4", "1x5")
    taken: dict[tuple[str, tuple[str, ...]], tuple[str, ...]] = {
        ("--batch", build): (*numbers, "0", "1000000000"),
        ("--threads", build[:1]): (),
        ("--workspace", build): (*numbers, "0", str(2**63 - 1)),
        ("--dla-core", build): numbers,
        ("--optimization-level", build): ("6", *numbers),
        ("--profile", build): ("other:1x4", *(p if p.startswith("x") else f"{X}:{p}" for p in profiles)),
        ("--threads", calibrate()): (*numbers, "0", "1000000000"),
        ("--budget", calibrate()): ("0", "-1", "nan", "inf", "x", "", "1e400h", "1d", "9" * 400 + "h"),
        ("--method", calibrate()): (
            "nope",
            "",
            "percentile",
            "percentile:0",
            "percentile:nan",
            "max:1",
            "mse,max",
        ),
        ("--state", calibrate()): ("", "x", "=", "a=b=c", f"{X}=", f"{X}=z", "z=y"),
        ("--parallel", calibrate()): (
            "loky:0",
            "loky:1000000000",
            "dask://",
            "threads",
            f"loky:{'9' * 5000}",
        ),
        ("--max-drop", gate()): ("-1", "1e999999999", "nan", "inf", "x", "", "9" * 5000, "200%", "%"),
        ("--confidence", gate()): ("-1", "1e999999999", "nan", "inf", "x", "", "9" * 5000, "0.5", "1"),
        ("--days", ("cache", "prune", "--cache", "own")): ("nan", "inf", "-1", "x", "", "1e400"),
    }
    for option in ("--duration", "--warm-up", "--iterations"):
        taken[option, ("bench", "m.onnx")] = ("nan", "inf", "-1", "x", "", "1e400")
    for option in ("--output", "--data", "--plan", "--cache", "--op-reference", "--recipe", "--exclude"):
        taken[option, calibrate()] = (*taken.get((option, calibrate()), ()), "")
    for option in ("--json", "--junit", "--tensors", "--eval", "--metric"):
        taken[option, gate()] = ("",)
    for (option, command), values in taken.items():
        for value in values:
            yield Hostile(
                f"{command[0]} {option} {value[:30]} ({len(value)})", (*command, f"{option}={value}")
            )
    empty = ("inspect", ""), ("report", ""), ("gate", "", "m.onnx"), ("bench", ""), ("build", "", "-o", "x")
    for arguments in (
        *empty,
        ("cache", "convert", "", "-o", "x"),
        ("quantize", "m.onnx", "--table", "", "-o", "x"),
    ):
        yield Hostile(f"empty: {' '.join(arguments)}", arguments)


NOT_UTF8 = os.fsdecode(b"\xff\xfe.onnx")

_PATHS = (
    NOT_UTF8,
    *("/dev/zero", "/dev/full", "pipe", "folder", "missing", "m.onnx/x", "loop", "socket", "/proc/self/mem"),
    *("sparse", "a" * 300, "text", "zeros"),
)
_TAKING: dict[str, Callable[[str], tuple[str, ...]]] = {
    "--recipe": lambda path: calibrate("--recipe", path),
    "--data": lambda path: calibrate("--data", path),
    "--plan": lambda path: calibrate("--plan", path),
    "--op-reference": lambda path: calibrate("--op-reference", path),
    "MODEL": lambda path: ("calibrate", path, *calibrate()[2:]),
    "--eval": lambda path: gate("--eval", path),
    "--metric": lambda path: gate("--metric", f"{path}.py:good"),
    "REFERENCE": lambda path: ("gate", path, *gate()[2:]),
    "CANDIDATE": lambda path: ("gate", "m.onnx", path, *gate()[3:]),
    "--table": lambda path: ("quantize", "m.onnx", "--table", path, "-o", "out.onnx"),
    "SOURCE": lambda path: ("cache", "convert", path, "-o", "out.cache"),
    "FILE": lambda path: ("inspect", path),
    "DIR": lambda path: ("report", path),
    "ENGINE": lambda path: ("bench", path),
}


def files() -> Iterator[Hostile]:
    """Things that are no files, or of a wrong kind, wherever a path is taken."""
    for (name, arguments), path in itertools.product(_TAKING.items(), _PATHS):
        yield Hostile(f"{name} {printable(path[:20])}", arguments(path), _no_files)
    for path in ("m.onnx", "m.onnx/x", "pipe", "/dev/zero", "loop", "socket"):
        yield Hostile(f"--cache {path}", calibrate("--cache", path), _no_files)
    json = {
        "deep": "[" * 10**5,
        "closed": "[" * 10**4 + "]" * 10**4,
        "NaN": "[NaN]",
        "number": "1e400",
        "cut": '{"a',
    }
    for name, text in json.items():
        bad = writes("bad.json", text)
        yield Hostile(f"inspect JSON: {name}", ("inspect", "bad.json"), bad)
        yield Hostile(f"plan JSON: {name}", calibrate("--plan", "bad.json"), bad)
        nested = writes("bad.json", text.replace("[", '{"a":').replace("]", "}"))
        yield Hostile(f"table JSON: {name}", _TAKING["--table"]("bad.json"), nested)


def _no_files(folder: Path) -> None:
    shutil.copy(folder / "m.onnx", folder / NOT_UTF8)
    os.mkfifo(folder / "pipe")
    (folder / "folder").mkdir()
    (folder / "loop").symlink_to("loop")
    with inside(folder), socket.socket(socket.AF_UNIX) as server:
        server.bind("socket")  # whose name may have 108 bytes
    with (folder / "sparse").open("wb") as file:
        file.truncate(1 << 40)
    (folder / "text").write_text("plain text\n")
    (folder / "zeros").write_bytes(bytes(1000))


# --- tables, and what trtexec measured ----------------------------------------------------------------


def tables() -> Iterator[Hostile]:
    """Calibration tables that give no scales."""
    head, row = "TRT-101601-EntropyCalibration2\n", f"{X}: 3c010204\n"
    texts: dict[str, bytes | str] = {
        "no head": row,
        "nothing": "",
        "a head alone": head,
        "no hexadecimal number": f"{head}{X}: zzzz\n",
        "too few digits": f"{head}{X}: 3c\n",
        "too many digits": f"{head}{X}: 3c0102043c010204\n",
        "not a number": f"{head}{X}: 7fc00000\n",
        "infinity": f"{head}{X}: 7f800000\n",
        "below 0": f"{head}{X}: bf800000\n",
        "0": f"{head}{X}: 00000000\n",
        "no colon": f"{head}{X} 3c010204\n",
        "a name with NUL": f"{head}{X}\0: 3c010204\n",
        "a name that is not UTF-8": f"{head}".encode() + b"\xff\xfe: 3c010204\n",
        "a name of 10 MB": f"{head}{'a' * 10**7}: 3c010204\n",
        "another tensor": f"{head}other: 3c010204\n",
    }
    for name, text in texts.items():
        arguments = ("quantize", "m.onnx", "--table", "bad.cache", "-o", "out.onnx")
        yield Hostile(f"table: {name}", arguments, writes("bad.cache", text))


_PROFILE = '[{"count": 2}, {"name": "y", "timeMs": 1.0, "averageMs": 0.5, "percentage": 100.0}]'
_LAYERS = (
    '{"Layers": [{"Name": "y", "LayerType": "MatrixMultiply", "Inputs": [], "Outputs": []}], "Bindings": []}'
)


def profiles() -> Iterator[Hostile]:
    """Files of trtexec's that are none, or whose figures cannot be; and GPUs that nobody knows."""
    job = ("deploy", "m.onnx", "--data", "d.npz", "--eval", "d.npz", "--metric", "cosine", "-o", "out")
    job += ("--backend", "none", "--method", "max", "--recover", "none")
    texts: dict[str, bytes | str] = {
        "nothing": "",
        "null": "null",
        "a list": "[]",
        "a number": "1",
        "a dict": "{}",
        "deep": "[" * 10**5,
        "text": "hello",
        "not UTF-8": b"\xff\xfe[",
        "numbers": "[" + ",".join(["1"] * 10**5) + "]",
        "a name that is a number": '[{"count": 5}, {"name": 5, "timeMs": 1}]',
        "a time that is not a number": '[{"count": 5}, {"name": "y", "timeMs": NaN, "averageMs": NaN}]',
        "a time without an end": '[{"count": 5}, {"name": "y", "timeMs": 1e999, "averageMs": 1e999}]',
        "a time below 0": '[{"count": 5}, {"name": "y", "timeMs": -1.0, "averageMs": -1.0}]',
        "a time that is text": '[{"count": 5}, {"name": "y", "timeMs": "a", "averageMs": "b"}]',
        "layers that are a number": '{"Layers": 5}',
        "layers that are none": '{"Layers": [5, null, "a", []], "Bindings": 3}',
        "layers of numbers": '{"Layers": [{"Name": 5, "Inputs": 7, "Outputs": [null]}], "Bindings": ["a"]}',
    }
    for name, text in texts.items():
        make = writes("bad.json", text, writes("p.json", _PROFILE), writes("l.json", _LAYERS))
        for profile, layers in (("bad", "l"), ("p", "bad"), ("bad", "bad")):
            files = ("--profile-json", f"{profile}.json", "--layer-info", f"{layers}.json")
            yield Hostile(f"profile {profile}, layers {layers}: {name}", (*job, *files), make)
    for name in ("", "x", "RTX 99", "a" * 10000, "\x1b[31m", "²"):
        yield Hostile(f"--gpu {printable(name[:10])!r}", (*job, f"--gpu={name}"))
    for name in ("", "int9", "int8,int8", "x" * 9999, "\x1b]0;a\x07"):
        yield Hostile(f"--io {printable(name[:10])!r}", (*job, f"--io={name}"))
