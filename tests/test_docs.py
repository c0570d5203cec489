"""The documentation says what is there: commands, options, names, files and links."""

import ast
import functools
import importlib
import importlib.util
import inspect
import re
import shlex
import typing
from pathlib import Path

import pytest
import yaml

import kelp
import kelp.config
from kelp.cli import COMMANDS, build_command, config_class
from kelp.raster.indices import INDICES

ROOT = Path(kelp.__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = sorted([ROOT / "README.md", ROOT / "ARCHITECTURE.md", *DOCS.rglob("*.md")])
FOLDERS = {
    "./kelp/data_prep/": "slice",
    "./kelp/nn/training/": "train",
    "./kelp/nn/inference/": "predict",
}


def load_hook():
    spec = importlib.util.spec_from_file_location("gen_cli", DOCS / "gen_cli.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


HOOK = load_hook()


def name_of(page):
    return page.relative_to(ROOT).as_posix()


def blocks(page, language):
    """The fenced code blocks of a page."""
    pattern = rf"^```{language}\n(.*?)^```$"
    return re.findall(pattern, page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


def commands_of(page):
    """`(command, arguments)` of every line of a page that starts kelp."""
    for block in blocks(page, "sh"):
        for line in block.replace("\\\n", " ").splitlines():
            # A shell's variable stands for a number here.
            words = shlex.split(line.replace("$threshold", "0.5"), comments=True)
            if words[:1] == ["kelp"] and words[1:2] and not words[1].startswith("-"):
                yield words[1], words[2:]
            elif words[:1] == ["python"] and words[1].startswith("./kelp/"):
                yield FOLDERS[words[1]], words[2:]


EXAMPLES = [(name_of(page), *example) for page in PAGES for example in commands_of(page)]


def test_there_are_examples():
    # The pages that a newcomer reads show every step.
    in_readme = [command for page, command, _ in EXAMPLES if page == "README.md"]
    assert in_readme == ["predict", "predict", "areas", "slice", "train", "predict", "predict"]
    shown = {command for _, command, _ in EXAMPLES}
    assert shown == set(COMMANDS) - {"demo"}  # `make demo` is how it is started


@pytest.mark.parametrize(("page", "command", "arguments"), EXAMPLES)
def test_examples_are_valid(page, command, arguments):
    """Options exist, values are allowed, and none that is required is left out."""
    values = build_command(command).make_context(command, list(arguments)).params
    given = {k: v for k, v in values.items() if v is not None and k not in ("config_file", "quiet")}
    config = config_class(command)
    if values["config_file"]:
        required = (k for k, info in config.model_fields.items() if info.is_required())
        given = dict.fromkeys(required, "from the file") | given
    config(**given)


def test_a_wrong_example_would_be_noticed(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("```sh\nkelp split --data_dir d \\\n    --no_such_option 1\n```\n")
    ((command, arguments),) = commands_of(page)
    with pytest.raises(Exception, match="no_such_option"):
        test_examples_are_valid("page", command, arguments)


def test_every_command_and_option_is_in_the_reference():
    page = HOOK.cli_page()
    for name in COMMANDS:
        section = page.split(f"## kelp {name}\n")[1].split("\n## ")[0]
        for option in config_class(name).model_fields:
            assert f"`--{option}`" in section
        assert f"| `kelp {name}` |" in (DOCS / "index.md").read_text(encoding="utf-8")
    assert all(f"`{index}`" in HOOK.indices_page() for index in INDICES)


def test_tables_of_generated_pages_are_whole():
    for make in (HOOK.cli_page, HOOK.indices_page):
        for line in make().splitlines():
            if line.startswith("| "):
                assert len(re.findall(r"(?<!\\)\|", line)) in (3, 4, 6), line


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_options_named_in_the_text_exist(page):
    fields = {option for name in COMMANDS for option in config_class(name).model_fields}
    known = {*fields, "config", "quiet", "help", "version", "soft_labels", "flag", "x", "data-dir"}
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    # What kelp has not, said as a limit; options of other programs.
    known |= {"max_memory", "places", "no-flag"}
    for option in re.findall(r"`--([\w-]+)", text):
        assert option in known, f"{name_of(page)}: --{option}"


def nav_pages(node):
    if isinstance(node, str):
        yield node
    else:
        for child in node.values() if isinstance(node, dict) else node:
            yield from nav_pages(child)


def test_the_navigation_names_every_page_once():
    text = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    listed = sorted(nav_pages(yaml.safe_load(text)["nav"]))
    written = [page.relative_to(DOCS).as_posix() for page in DOCS.rglob("*.md")]
    assert listed == sorted([*written, *HOOK.PAGES])


def anchors(text):
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", h.lower()).strip().replace(" ", "-") for h in headings}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page):
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"https?://", target):
            continue
        path, _, anchor = target.partition("#")
        found = (page.parent / path).resolve() if path else page
        generated = None
        if found.is_relative_to(DOCS):
            generated = HOOK.PAGES.get(found.relative_to(DOCS).as_posix())
        assert generated or found.is_file(), f"{name_of(page)}: {target}"
        if anchor:
            content = generated() if generated else found.read_text(encoding="utf-8")
            assert anchor in anchors(content), f"{name_of(page)}: {target}"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_tests_that_are_named_exist(page):
    for path, name in re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", page.read_text(encoding="utf-8")):
        tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
        functions = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
        assert name in functions, f"{name_of(page)}: {path}::{name}"


@pytest.mark.parametrize("page", [ROOT / "README.md", DOCS / "comparison.md"], ids=name_of)
def test_commands_that_show_a_claim_find_a_test(page):
    text = page.read_text(encoding="utf-8")
    shown = re.findall(r'`pytest ((?:tests/[\w/]+\.py ?)+)(?:-k ("[^"]+"|\w+))?`', text)
    assert len(shown) == text.count("`pytest ")
    for paths, expression in shown:
        wanted = [word for word in expression.strip('"').split() if word != "or"]
        names = re.findall(
            r"def (test_\w+)", "".join((ROOT / p).read_text() for p in paths.split())
        )
        for word in wanted:
            assert any(word in name for name in names), f"-k {word} of {paths}"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_python_examples_name_what_exists(page):
    """Examples compile, and what they import or take from kelp is there, with these arguments."""
    for block in blocks(page, "python"):
        tree = ast.parse(block)
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.module.startswith("kelp"):
                module = importlib.import_module(node.module)
                assert all(hasattr(module, alias.name) for alias in node.names)
            if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "kelp":
                assert node.attr in kelp.__all__, f"{name_of(page)}: kelp.{node.attr}"


def type_of(node, results):
    """The class of an expression such as `result.tuned[0].calibration`."""
    if isinstance(node, ast.Name):
        return results[node.id]
    kind = type_of(node.value, results)
    if type(None) in typing.get_args(kind):  # of `Trial | None`, the first
        kind = typing.get_args(kind)[0]
    if isinstance(node, ast.Subscript):
        return typing.get_args(kind)[0]
    found = inspect.getattr_static(kind, node.attr, None)
    if isinstance(found, property | functools.cached_property):
        found = found.fget if isinstance(found, property) else found.func
        return typing.get_type_hints(found).get("return")
    return found or typing.get_type_hints(kind)[node.attr]


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_results_of_python_examples_hold_what_is_read(page):
    for block in blocks(page, "python"):
        results = {}
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.Assign) and isinstance(node.value, ast.Call):
                call = node.value.func
                if isinstance(call, ast.Attribute) and ast.unparse(call.value) == "kelp":
                    hints = typing.get_type_hints(
                        getattr(kelp, call.attr), localns=vars(kelp.config)
                    )
                    results[ast.unparse(node.targets[0])] = hints["return"]
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.Attribute) and ast.unparse(node).startswith("result."):
                assert type_of(node, results)


def test_objects_of_the_python_page_exist():
    page = (DOCS / "reference" / "python.md").read_text(encoding="utf-8")
    for name in re.findall(r"^::: ([\w.]+)$", page, re.MULTILINE):
        module, _, attribute = name.rpartition(".")
        assert hasattr(importlib.import_module(module), attribute), name


def test_the_changelog_has_this_version():
    assert f"## {kelp.__version__}\n" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
