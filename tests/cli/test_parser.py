"""Help, missing and misspelled options, quiet, completion, and that nothing heavy is loaded for them."""

from __future__ import annotations

import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable

import pytest
from jobs import Case, Run

from trtq.cli.completion import SHELLS
from trtq.cli.main import COMMANDS, command, parser
from trtq.cli.options import GROUPS
from trtq.errors import ExitCode
from trtq.recipe import options

Command = Callable[..., Run]


SPELLED = {
    **{"model": "MODEL", "output": "-o OUT", "reference": "REFERENCE", "candidate": "CANDIDATE"},
    **{"file": "FILE", "folder": "DIR", "engines": "ENGINE"},
}
"""How what is required stands in the help, where it is not `--name`."""


def shown(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What a command line that ends by itself prints."""
    with pytest.raises(SystemExit) as ended:
        parser().parse_args(arguments)
    assert ended.value.code == 0
    return capsys.readouterr().out


def test_every_option_is_in_one_group() -> None:
    grouped = [name for names in GROUPS.values() for name in names]
    assert sorted(grouped) == sorted(option.name for option in options())


@pytest.mark.parametrize("name", COMMANDS)
def test_help_has_what_is_required_first_then_examples_and_exit_codes(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    text = " ".join(shown(capsys, name, "--help").split())
    found = command(name)
    usage, required = text.partition("[options]")[0], text.partition("required:")[2]
    for title in (*GROUPS, f"of {name}", "other"):
        required = required.partition(f"{title}:")[0]
    for item in found.required:
        for needed in [item] if isinstance(item, str) else item:
            word = SPELLED.get(needed, f"--{needed} ")
            assert word in usage
            assert word in required
    for option in found.options:
        assert f"--{option.replace('_', '-')}" in text or option == "model"
    assert text.index("examples:") < text.index("exit codes:")
    assert all(f"{int(code)} {meaning}" in text for code, meaning in found.codes)


@pytest.mark.parametrize("name", COMMANDS)
def test_examples_are_command_lines(name: str) -> None:
    examples = command(name).examples
    assert examples
    for example in examples:
        program, *arguments = shlex.split(example.partition(" > ")[0])
        assert program == "trtq"
        assert parser().parse_args(arguments).command is command(name)


@pytest.mark.parametrize("name", [name for name in COMMANDS if command(name).required])
def test_all_that_is_missing_is_said_at_once(name: str, trtq_run: Command) -> None:
    run = trtq_run(name)
    assert run.code == ExitCode.BAD_INPUT
    if command(name).options:
        assert len(command(name).required) == run.err.count(", ") + 1 + run.err.count(" and ")
        assert "missing" in run.err
    else:
        assert "required: " in run.err


def test_what_a_recipe_gives_is_not_missing(small: Case, trtq_run: Command) -> None:
    recipe = small.model.with_name("partly.toml")
    recipe.write_text('metric = "top1"\neval = "data.npz"\n')
    run = trtq_run("gate", small.model, "--recipe", recipe)
    assert run.err.startswith("trtq: CANDIDATE is missing\n")


@pytest.mark.parametrize(
    ("line", "problem", "remedy"),
    [
        ("depoly m.onnx", "there is no command 'depoly'", "did you mean deploy?"),
        ("xyz", "there is no command 'xyz'", "see 'trtq --help'"),
        ("deploy m.onnx --evl e.npz", "'trtq deploy' has no option --evl", "did you mean --eval?"),
        (
            "gate a b --metrc=top1 --jnuit f",
            "has no option --metrc and no option --jnuit",
            "did you mean --metric and --junit?",
        ),
        ("calibrate m.onnx --zzz", "has no option --zzz", "see 'trtq calibrate --help'"),
        ("gate a b c", "'c' is one argument too many", "see 'trtq gate --help'"),
    ],
)
def test_what_is_misspelled(line: str, problem: str, remedy: str, trtq_run: Command) -> None:
    run = trtq_run(*line.split())
    assert run.code == ExitCode.BAD_INPUT
    assert problem in run.err
    assert f"remedy: {remedy}" in run.err


def test_quiet_says_errors_only(small: Case, trtq_run: Command) -> None:
    arguments = ("gate", small.model, small.model, "--eval", small.data, "-q")
    run = trtq_run(*arguments, "--metric", "top1")
    assert (run.code, run.out, run.err) == (ExitCode.PASS, "", "")
    run = trtq_run(*arguments, "--metric", "top1", "--confidence", "0.999")
    assert (run.code, run.out, run.err) == (ExitCode.INCONCLUSIVE, "", "")
    run = trtq_run(*arguments, "--metric", "best")
    assert (run.code, run.out) == (ExitCode.BAD_INPUT, "")
    assert "unknown metric 'best'" in run.err


@pytest.mark.parametrize("argument", ["--version", "--help"])
def test_version_and_help_need_python_only(argument: str) -> None:
    code = (
        "import atexit, sys\n"
        "before = {name.partition('.')[0] for name in sys.modules}\n"
        "def rest():\n"
        "    new = {name.partition('.')[0] for name in sys.modules} - before - set(sys.stdlib_module_names)\n"
        "    print(sorted(new), file=sys.stderr)\n"
        "atexit.register(rest)\n"
        f"sys.argv = ['trtq', {argument!r}]\n"
        "from trtq.__main__ import main\n"
        "main()\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "trtq" in run.stdout
    assert run.stderr.strip() == "['trtq']"


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (["trtq", "dep"], {"deploy"}),
        (["trtq", "deploy", "--max-"], {"--max-drop"}),
        (["trtq", "gate", "--ju"], {"--junit"}),
        (["trtq", "build", "--backend", "tensorrt-"], {"tensorrt-rtx"}),
    ],
)
def test_bash_completes(words: list[str], found: set[str], trtq_run: Command) -> None:
    pytest.importorskip("shtab", reason="shtab is not installed")
    script = trtq_run("completion", "bash").out
    asked = f"COMP_WORDS=({shlex.join(words)}); COMP_CWORD={len(words) - 1}; COMP_LINE={shlex.join(words)!r}"
    code = f"{script}\n{asked}\n_shtab_trtq; printf '%s\\n' \"${{COMPREPLY[@]}}\""
    run = subprocess.run(["bash", "-c", code], capture_output=True, text=True, check=True)
    assert set(run.stdout.split()) == found


@pytest.mark.parametrize("shell", SHELLS)
def test_completion_is_a_script_of_the_shell(shell: str, trtq_run: Command) -> None:
    pytest.importorskip("shtab", reason="shtab is not installed")
    script = trtq_run("completion", shell).out
    assert all(name in script for name in COMMANDS)
    if shutil.which(shell):
        subprocess.run([shell, "-n"], input=script, text=True, check=True, capture_output=True)
