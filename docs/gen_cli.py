"""Pages of the documentation that are made from the code when the site is built (a mkdocs hook).

`reference/cli.md` comes from the configuration classes, `reference/indices.md` from the table of
spectral indices, `reference/comparison.md` from what `comparison.json` says of itself;
ARCHITECTURE.md and CHANGELOG.md of the repository become pages; their links are as seen from there.

    python docs/gen_cli.py    # prints the command line page
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from pydantic.fields import FieldInfo

from kelp.cli import COMMANDS, config_class
from kelp.config.base import choices
from kelp.data_prep.catalogue import formula
from kelp.nn.comparison.result import FIELDS
from kelp.raster.indices import INDICES

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files

ROOT: Final = Path(__file__).parents[1]

_INTRODUCTION: Final = """\
# Command line

This page is made from the configuration classes of `kelp.config`, as `kelp <command> --help` is.

Rules for every command:

- `--data_dir` and `--data-dir` are one option; so are `--x=1` and `--x 1`.
- A boolean takes `--flag`, `--no-flag`, `--flag True` or `--flag=False`.
- A list is comma-separated: `--bands R,G,B`.
- Of an option that is given twice the last one wins.
- `--config FILE` reads options from a YAML file of `option: value` lines. Flags on the command
  line win over it. The resolved options of a command are written as `kelp-<command>.yaml` beside
  its output, in the same form.
- `--quiet` shows warnings and errors only. On a terminal there are progress bars, elsewhere plain
  lines on stderr.
- Exit status: 0 done; 2 bad input or usage, with one line on stderr that names the cause and the
  way out; 130 after Ctrl-C; 1 for a bug, with a traceback.

Three commands have a second form, run from the repository's folder:

| command | the same as |
|---|---|
| `python ./kelp/data_prep/ …` | `kelp slice …` |
| `python ./kelp/nn/training/ …` | `kelp train …` |
| `python ./kelp/nn/inference/ …` | `kelp predict …` |
"""


def cli_page() -> str:
    """Every command with every option, its default and its meaning."""
    parts = [_INTRODUCTION]
    for name, command in COMMANDS.items():
        config = config_class(name)
        parts.append(f"## kelp {name}\n\n{config.__doc__}\n")
        parts.append(
            f"From Python: `{command.target.replace(':', '.')}` with a "
            f"`kelp.config.{config.__name__}`.\n"
        )
        parts.append("| option | default | meaning |\n|---|---|---|")
        parts += [_row(field, info) for field, info in config.options().items()]
        parts.append("")
    return "\n".join(parts)


def indices_page() -> str:
    """Every spectral index with its formula, bounds and source."""
    lines = [
        "# Spectral indices",
        "",
        "Names for `--spectral_indices` of `kelp stats` and `kelp train`. With `--index_input dn`",
        "(the default) the stored integers go into the formulas as they are. With `--index_input",
        "reflectance` the optical bands are turned into surface reflectance, clipped to 0.001-1.2,",
        "and the index is clipped to the range below: the published values. `kelp indices` prints",
        "this table.",
        "",
        "| name | full name | formula | range | source |",
        "|---|---|---|---|---|",
        *(
            f"| `{index.name}` | {index.long_name} | {formula(index)} "
            f"| {index.low:g} to {index.high:g} | {index.source} |"
            for index in INDICES.values()
        ),
        "",
    ]
    return "\n".join(lines)


def comparison_page() -> str:
    """Every field of `comparison.json`."""
    lines = [
        "# Fields of comparison.json",
        "",
        "Written by `kelp compare` (see [Should I slice?](../howto/should-i-slice.md)). The file",
        "holds this table, too, as `fields`. `[]` stands for each of a list, `*` for each by name.",
        "",
        "| field | meaning |",
        "|---|---|",
        *(f"| `{path}` | {words} |" for path, words in FIELDS.items()),
        "",
    ]
    return "\n".join(lines)


def root_page(name: str) -> str:
    """A Markdown file of the repository's root, with links as seen from the site's."""
    return (ROOT / name).read_text(encoding="utf-8").replace("](docs/", "](")


PAGES: Final[dict[str, Callable[[], str]]] = {
    "reference/cli.md": cli_page,
    "reference/indices.md": indices_page,
    "reference/comparison.md": comparison_page,
    "architecture.md": lambda: root_page("ARCHITECTURE.md"),
    "changelog.md": lambda: root_page("CHANGELOG.md"),
}
"""Generated pages by their path in the site's sources."""


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages to the site (called by mkdocs)."""
    from mkdocs.structure.files import File

    for path, make in PAGES.items():
        files.append(File.generated(config, path, content=make()))
    return files


def _row(field: str, info: FieldInfo) -> str:
    extra: Any = info.json_schema_extra or {}
    spellings = ", ".join(f"`--{name}`" for name in (field, *extra.get("aliases", ())))
    meaning = (info.description or "").replace("|", "\\|")
    return f"| {spellings} | {_default(info)} | {meaning}{_choices(info)} |"


def _default(info: FieldInfo) -> str:
    if info.is_required():
        return "required"
    value = None if info.default_factory else info.default
    if value is None or value == ():
        return "-"
    return f"`{','.join(map(str, value)) if isinstance(value, tuple) else value}`"


def _choices(info: FieldInfo) -> str:
    """The values that an option takes, where they are few."""
    words = choices(info.annotation)
    return ". One of " + ", ".join(f"`{word}`" for word in words) if words else ""


if __name__ == "__main__":
    sys.stdout.write(cli_page())
