"""What MkDocs does beyond `docs/`: the reference is made of the code, the how-tos with files are `examples/`.

Links are written as GitHub follows them; `on_page_markdown` turns those into `examples/` into the site's.
"""

from __future__ import annotations

import re
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "tools")]

import site_reference  # noqa: E402

LANGUAGES = {".py": "python", ".toml": "toml", ".yml": "yaml"}


def on_files(files: Files, config: Any) -> Files:
    """Add the pages that are made."""
    pages = {f"reference/{name}.md": make() for name, make in site_reference.PAGES.items()}
    pages |= {f"howto/{folder.name}.md": example_page(folder) for folder in examples()}
    for name, content in pages.items():
        files.append(File.generated(config, name, content=content))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Turn links out of `docs/`, as GitHub follows them, into links to the pages made of their targets."""
    up = "../" * page.file.src_uri.count("/")
    markdown = re.sub(r"\]\((?:\.\./)+examples/(\w+)/README\.md", rf"]({up}howto/\1.md", markdown)
    markdown = re.sub(r"\]\((?:\.\./)+plugins/README\.md", rf"]({up}reference/plugins.md", markdown)
    return markdown.replace("<!-- blocks that were not run -->", not_run())


def not_run() -> str:
    """A table of the blocks that nothing here can run, by what they need."""
    pages = [*ROOT.glob("docs/**/*.md"), *ROOT.glob("examples/*/README.md"), ROOT / "plugins/README.md"]
    needs = [
        found for page in sorted(pages) for found in re.findall(r'title="needs (.*?)"', page.read_text())
    ]
    rows = [f"| {what} | {count} |" for what, count in sorted(Counter(needs).items())]
    return "\n".join(["| need | blocks |", "|-|-|", *rows])


def examples() -> list[Path]:
    """The folders with a README."""
    return sorted(path.parent for path in (ROOT / "examples").glob("*/README.md"))


def example_page(folder: Path) -> str:
    """An example's README and its files as a page of the how-tos."""
    text = (folder / "README.md").read_text()
    text = text.replace("](../../docs/", "](../")
    text = re.sub(r"\]\(\.\./(\w+)/README\.md", r"](\1.md", text)
    files = sorted(path for path in folder.rglob("*") if path.suffix in LANGUAGES)
    listing = []
    for path in files:
        name = path.relative_to(folder).as_posix()
        text = text.replace(f"]({name})", f"](#{slug(name)})")
        listing += [f"### {name} {{ #{slug(name)} }}", ""]
        listing += [f"```{LANGUAGES[path.suffix]}", path.read_text().rstrip(), "```", ""]
    return "\n".join([text, f"## Files of `examples/{folder.name}`", "", *listing])


def slug(name: str) -> str:
    """The anchor of a file."""
    return re.sub(r"[./]", "-", name)
