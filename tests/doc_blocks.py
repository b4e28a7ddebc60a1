"""The fenced blocks of a Markdown page, and how they are run in the order of the page.

A block is, by its info string,

- `sh` or `python` without a title: run; the Python of a page shares one namespace;
- with a title that names a file: written to that file, to be used by what follows;
- `sh` or `python` with the title "needs ...": not run, because it needs a GPU, a service or another machine.
  It still has to parse.
- of any other language, without a title: shown only.

A shell block whose first line is `# exit code N` has to end with that.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

FENCE = re.compile(r"^```(\w+)(.*?)\n(.*?)^```$", re.M | re.S)
RUN = ("sh", "python")


@dataclass(frozen=True)
class Block:
    """A fenced block.

    Attributes:
        line: of the page, from 1.
    """

    language: str
    title: str | None
    content: str
    line: int

    @property
    def needs(self) -> str | None:
        """What it needs that is not here."""
        return self.title if self.title is not None and self.title.startswith("needs ") else None

    @property
    def file(self) -> str | None:
        """The file that it is."""
        return None if self.needs else self.title

    @property
    def runs(self) -> bool:
        """Whether it is run."""
        return self.language in RUN and self.title is None


def blocks_of(text: str) -> list[Block]:
    """The blocks of a page that begin at the start of a line."""
    found = []
    for match in FENCE.finditer(text):
        title = re.search(r'title="([^"]*)"', match[2])
        line = text.count("\n", 0, match.start()) + 1
        found.append(Block(match[1], title and title[1], match[3], line))
    return found


def check(block: Block) -> None:
    """Fail where a block of shell or Python does not parse."""
    if block.language == "python":
        ast.parse(block.content)
    elif block.language == "sh":
        subprocess.run(["bash", "-n", "-c", block.content], check=True)


def run(page: Path) -> None:
    """Run a page's blocks in the folder at hand; ends the process at the first that fails."""
    names: dict[str, object] = {"__name__": "__main__"}
    sys.path[0] = ""  # as for `python` without a file
    for block in blocks_of(page.read_text()):
        if block.file is not None:
            Path(block.file).parent.mkdir(parents=True, exist_ok=True)
            Path(block.file).write_text(block.content)
        elif block.runs:
            print(f"--- {page}:{block.line}", flush=True)
            if block.language == "python":
                exec(compile(block.content, f"{page}:{block.line}", "exec"), names)
            else:
                _run_shell(block.content)


def _run_shell(content: str) -> None:
    expected = re.match(r"# exit code (\d+)\n", content)
    done = subprocess.run(["bash", "-euo", "pipefail", "-c", content])
    if done.returncode != (int(expected[1]) if expected else 0):
        sys.exit(f"exit code {done.returncode}")


if __name__ == "__main__":
    run(Path(sys.argv[1]))
