"""`trtq`: parses the command line, runs one command, and turns errors into messages and exit codes."""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import shlex
import sys
import traceback
from collections.abc import Sequence
from functools import partial
from typing import NoReturn

import trtq
from trtq import stops
from trtq.cli.bench import BENCH
from trtq.cli.build import BUILD
from trtq.cli.cache import CACHE
from trtq.cli.calibrate import CALIBRATE
from trtq.cli.command import Command, path_text
from trtq.cli.demo import DEMO
from trtq.cli.deploy import DEPLOY
from trtq.cli.doctor import DOCTOR
from trtq.cli.gate import GATE
from trtq.cli.inspect import INSPECT
from trtq.cli.migrate import MIGRATE
from trtq.cli.quantize import QUANTIZE
from trtq.cli.report import REPORT
from trtq.cli.sensitivity import SENSITIVITY
from trtq.cli.study import STUDY
from trtq.errors import ExitCode, InputError, TrtqError
from trtq.escapes import printable
from trtq.recipe import FLAG, flag, from_command_line, options

COMMANDS: tuple[Command, ...] = (
    DEMO,
    DEPLOY,
    CALIBRATE,
    QUANTIZE,
    BUILD,
    GATE,
    INSPECT,
    CACHE,
    REPORT,
    SENSITIVITY,
    STUDY,
    MIGRATE,
    BENCH,
    DOCTOR,
)
"""Every command, in the order of the help."""

_STDERR = 2

_BROKEN_PIPE = 141
"""The exit code as a shell has it after SIGPIPE."""


class _Parser(argparse.ArgumentParser):
    """Bad usage is an error like any other: one message, exit code 2."""

    def error(self, message: str) -> NoReturn:
        raise InputError(message, remedy=f"see '{self.prog} --help'")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code: `trtq.errors.ExitCode`, or 128 and the number of the
    signal that ended it (130: Ctrl-C, 143: SIGTERM).
    """
    _occupy_streams()
    with stops.handled():
        return _main(list(sys.argv[1:] if arguments is None else arguments))


def _main(arguments: list[str]) -> int:
    debug = "--debug" in arguments
    try:
        with stops.unmasked():
            given = parser().parse_args(arguments)
            given.command_line = shlex.join(["trtq", *arguments])
            with contextlib.redirect_stdout(sys.stdout):  # undoes what `recipe_of` may turn it to
                code = int(given.command.run(given))
            _flush_output()
            return code
    except TrtqError as error:
        return _report(error, debug)
    except KeyboardInterrupt:
        return stops.ended()
    except BrokenPipeError:
        _flush_output()
        return _BROKEN_PIPE
    except OSError as error:
        cause = error.strerror or error
        return _report(InputError("cannot read or write", file=error.filename, cause=cause), debug)
    except Exception as error:
        if debug:
            raise
        print(
            printable(f"trtq: internal error: {type(error).__name__}: {error}\n")
            + "  remedy: run again with --debug and report what it shows",
            file=sys.stderr,
        )
        return int(ExitCode.BAD_INPUT)


def _occupy_streams() -> None:
    """Open what the shell closed of the three standard streams, as by `2>&-`: else a file of ours would get
    its number, into which libraries print. What is written there fails."""
    while (descriptor := os.open(os.devnull, os.O_RDONLY)) <= _STDERR:
        pass
    os.close(descriptor)
    if sys.stderr is None:
        sys.stderr = io.StringIO()


def _report(error: TrtqError, debug: bool) -> int:
    if debug:
        print(printable(traceback.format_exc()), file=sys.stderr)
    print(printable(f"trtq: {error}"), file=sys.stderr)
    return int(error.exit_code)


def _flush_output() -> None:
    """Write what is still in the buffer; a reader that has gone, as with `| head`, is not an error."""
    try:
        if sys.stdout is not None:  # None: closed by the shell
            sys.stdout.flush()
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if not isinstance(error, BrokenPipeError):
            raise


def parser() -> argparse.ArgumentParser:
    """The whole command line."""
    root = _Parser(
        prog="trtq",
        description="INT8 deployment for TensorRT: from a trained ONNX model to an engine proved accurate.",
        epilog="Exit codes: 0 pass, 1 gate failed, 2 bad usage or input, 3 inconclusive, 4 backend missing.",
    )
    root.add_argument("--version", action="version", version=f"trtq {trtq.__version__}")
    subparsers = root.add_subparsers(metavar="COMMAND", required=True, parser_class=_Parser)
    for command in COMMANDS:
        sub = subparsers.add_parser(command.name, help=command.summary, description=command.summary)
        for argument in command.arguments:
            argument.add_to(sub)
        if command.options:
            sub.add_argument(
                "--recipe",
                type=path_text,
                metavar="FILE.toml",
                help="options in a file; the command line wins",
            )
            for name in command.options:
                _add_option(sub, name, positional=name == "model")
        sub.add_argument("-q", "--quiet", action="store_true", help="print the result only")
        sub.add_argument("--debug", action="store_true", help="show tracebacks")
        sub.set_defaults(command=command)
    return root


def _add_option(sub: argparse.ArgumentParser, name: str, *, positional: bool) -> None:
    (field,) = options([name])
    metadata = field.metadata
    if positional:
        sub.add_argument(name, nargs="?", metavar=metadata["metavar"], help=metadata["help"])
        return
    names = (*metadata["flags"], flag(name))
    kind, value = metadata["kind"], partial(from_command_line, name)
    if kind is FLAG:
        sub.add_argument(*names, action="store_const", const=True, help=metadata["help"])
    elif kind.many is not None:
        sub.add_argument(*names, action="append", type=value, metavar="X", help=metadata["help"])
    else:
        default = "" if field.default is None else f" (default: {kind.write(field.default)})"
        sub.add_argument(
            *names,
            type=value,
            choices=kind.choices,
            metavar=metadata["metavar"],
            help=(metadata["help"] + default).replace("%", "%%"),
        )


if __name__ == "__main__":
    sys.exit(main())
