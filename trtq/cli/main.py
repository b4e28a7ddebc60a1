"""`trtq`: parses the command line, runs one command, and turns errors into messages and exit codes."""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import shlex
import sys
import traceback
from collections.abc import Collection, Container, Mapping, Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Any, NoReturn

import trtq
from trtq import stops
from trtq.errors import ExitCode, InputError, TrtqError
from trtq.escapes import printable

if TYPE_CHECKING:
    from trtq.cli.command import Command

COMMANDS: Mapping[str, str] = {
    "demo": "run the main job on a bundled model and data: calibrate, quantize, build, gate",
    "deploy": "the whole workflow: an fp32 model and data become an INT8 engine and a verdict",
    "calibrate": "make a calibration table from data",
    "quantize": "insert Q/DQ: write an explicit INT8 model",
    "build": "build an engine from an ONNX model and say what it runs in INT8",
    "gate": "compare a candidate's accuracy with a reference's and decide",
    "inspect": "describe a folder of results, or a file: model, plan, table, engine, verdict, ...",
    "cache": "list, show, verify or prune what is cached; convert tables to Q/DQ models and back",
    "report": "write report.html again from a folder of results",
    "sensitivity": "rank the layers by what INT8 in each of them does to the outputs",
    "study": "the paper's tables for your model: methods, weights, partial quantization, learning",
    "migrate": "from TensorRT 10: an fp32 model and its calibration table become an explicit model and an"
    " engine",
    "bench": "time engines on the GPU; without one, compare what was compiled. Plan files are code: load"
    " only those you built or trust",
    "doctor": "what is installed, what works here, and what to install for the rest",
    "completion": "print the completion of commands and options for your shell",
}
"""Every command, in the order of the help, and what it does. Its module in `trtq.cli`, which has its name, is
imported when it is called: `trtq --version` and `trtq --help` need nothing but Python."""

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
            given = _parsed(arguments)
            given.command_line = shlex.join(["trtq", *arguments])
            shown = io.StringIO() if given.quiet else sys.stdout
            with contextlib.redirect_stdout(shown):  # undoes what `recipe_of` may turn it to
                code = _run(given)
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


def _run(given: argparse.Namespace) -> int:
    """Run a command; an error that ends it is also left where its verdict was asked for."""
    try:
        return int(given.command.run(given))
    except BrokenPipeError:  # of a reader of what is printed
        raise
    except Exception as error:
        if given.said is not None:
            given.said.leave(error)
        raise


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


def command(name: str) -> Command:
    """The command of a name among `COMMANDS`."""
    found: Command = getattr(import_module(f"trtq.cli.{name}"), name.upper())
    return found


def parser(wanted: Container[str] = COMMANDS, completion: Any = None) -> argparse.ArgumentParser:
    """The command line.

    Args:
        wanted: the commands that get their options; the others are there by name.
        completion: as for `trtq.cli.parser.fill`.
    """
    root = _Parser(
        prog="trtq",
        description="INT8 deployment for TensorRT: from a trained ONNX model to an engine proved accurate.",
        epilog="Exit codes: 0 pass, 1 gate failed, 2 bad usage or input, 3 inconclusive, 4 backend missing."
        " 'trtq COMMAND --help' shows a command's options, examples and exit codes.",
    )
    root.add_argument("--version", action="version", version=f"trtq {trtq.__version__}")
    subparsers = root.add_subparsers(metavar="COMMAND", required=True, parser_class=_Parser)
    for name, summary in COMMANDS.items():
        sub = subparsers.add_parser(name, help=summary, description=summary, add_help=False)
        if name in wanted:
            from trtq.cli.parser import fill

            fill(sub, command(name), completion)
    return root


def _parsed(arguments: Sequence[str]) -> argparse.Namespace:
    """What the command line says.

    Raises:
        InputError: there is no such command or option, or one cannot have the value that is given.
    """
    name = next((argument for argument in arguments if not argument.startswith("-")), None)
    if name is not None and name not in COMMANDS:
        raise InputError(f"there is no command '{name}'", remedy=_meant([name], COMMANDS, "trtq"))
    given, unknown = parser([name] if name else []).parse_known_args(arguments)
    if unknown:
        from trtq.cli.parser import spelled_names

        words = [word.partition("=")[0] for word in unknown]
        flags = [word for word in words if word.startswith("-")]
        if not flags:
            raise InputError(f"'{words[0]}' is one argument too many", remedy=f"see 'trtq {name} --help'")
        raise InputError(
            f"'trtq {name}' has no option {' and no option '.join(flags)}",
            remedy=_meant(flags, spelled_names(given.command), f"trtq {name}"),
        )
    return given


def _meant(words: Sequence[str], known: Collection[str], prog: str) -> str:
    """A question whether names were meant that are spelled alike, or where all are listed."""
    import difflib

    close = [match for word in words for match in difflib.get_close_matches(word, known, 1)]
    return f"did you mean {' and '.join(close)}?" if close else f"see '{prog} --help'"


if __name__ == "__main__":
    sys.exit(main())
