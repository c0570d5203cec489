"""A module imports only from its own package or from those above it in ARCHITECTURE.md."""

import ast
import re
import sys
from pathlib import Path

import pytest

import kelp

ROOT = Path(kelp.__file__).parent
PAGE = (ROOT.parent / "ARCHITECTURE.md").read_text(encoding="utf-8")
LISTED = re.search(r"^## Packages$.*?^```$\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)[1]
PACKAGES = [line.split()[0] for line in LISTED.splitlines()]
GROUND = ("_version", "errors", "progress")
"""Need the standard library only."""
WITHOUT_TORCH = PACKAGES[: PACKAGES.index("nn")]
NOT_YET: set[tuple[str, str]] = set()
"""Imports that still point down the list; a new one is an error, so is one that has gone."""


def modules():
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT.parent).with_suffix("").parts
        yield ".".join(parts).removesuffix(".__init__"), ast.parse(path.read_text())


MODULES = dict(modules())


def level(module):
    """Position in the list; the package itself only names what it imports on first use."""
    parts = module.split(".")
    if module.endswith("__main__"):
        return len(PACKAGES)
    return PACKAGES.index(parts[1]) if len(parts) > 1 else -1


def imports(tree):
    """Names of the modules that a tree imports, wherever in the file."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                yield full if full in MODULES else node.module


def test_every_package_is_listed_and_exists():
    found = {p.stem for p in ROOT.iterdir() if p.suffix == ".py" or (p / "__init__.py").is_file()}
    assert found - {"__init__"} == set(PACKAGES)


def test_imports_point_up_the_list():
    against = {
        (module, name)
        for module, tree in MODULES.items()
        for name in imports(tree)
        if module != "kelp" and name.split(".")[0] == "kelp" and level(name) > level(module)
    }
    assert against == NOT_YET


def test_there_are_no_cycles():
    graph = {
        name: {i for i in imports(tree) if i in MODULES and i not in (name, "kelp")}
        for name, tree in MODULES.items()
    }
    done, path = set(), []

    def visit(name):
        assert name not in path, f"cycle: {' -> '.join([*path, name])}"
        if name in done:
            return
        path.append(name)
        for other in sorted(graph[name]):
            visit(other)
        path.pop()
        done.add(name)

    for name in graph:
        visit(name)


def packages_imported(prefixes):
    for module, tree in MODULES.items():
        if module.split(".")[1:2] and module.split(".")[1] in prefixes:
            for name in imports(tree):
                yield module, name.split(".")[0]


def test_the_ground_needs_the_standard_library_only():
    allowed = {"kelp", *sys.stdlib_module_names}
    assert [(m, name) for m, name in packages_imported(GROUND) if name not in allowed] == []


def test_the_heart_needs_numpy_and_scipy_only():
    allowed = {"kelp", "numpy", "scipy", *sys.stdlib_module_names}
    assert [(m, name) for m, name in packages_imported(["tiling"]) if name not in allowed] == []


@pytest.mark.parametrize("heavy", ["torch", "lightning", "mlflow", "timm"])
def test_only_networks_know_torch(heavy):
    assert [module for module, name in packages_imported(WITHOUT_TORCH) if name == heavy] == []


def test_training_and_prediction_do_not_know_each_other():
    for module, tree in MODULES.items():
        if module.startswith("kelp.nn.training"):
            assert not any(name.startswith("kelp.inference.predict") for name in imports(tree))


def test_no_module_hides_a_public_function():
    """`import kelp.predict` would replace the function `kelp.predict`."""
    top = {name.split(".")[1] for name in MODULES if name.count(".") >= 1}
    assert top & set(kelp.__all__) == {"config"}


UNPICKLERS = {"pickle", "cPickle", "_pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
EXECUTERS = {"eval", "exec", "compile", "__import__", "execfile"}
# Functions by their last name, on whatever they are called.
LOADERS = {
    "read_pickle",
    "unsafe_load",
    "full_load",
    "unsafe_load_all",
    "full_load_all",
    "load_from_checkpoint",
    "Unpickler",
    "find_class",
    "load_module",
    "exec_module",
}
FORBIDDEN = {"yaml.load", "yaml.load_all", "torch.jit.load", "torch.hub.load", "torch.export.load"}


def aliases(tree):
    """What the names of a module stand for: `from torch import load as l` gives l: torch.load."""
    names = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.asname: alias.name for alias in node.names if alias.asname}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {a.asname or a.name: f"{node.module}.{a.name}" for a in node.names}
    return names | {"np": "numpy", "pd": "pandas"}


def hazards(tree):
    """Everything in a module that could execute or unpickle data."""
    known = aliases(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (a.name for a in node.names if a.name.split(".")[0] in UNPICKLERS)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in UNPICKLERS:
            # An error to catch is no danger.
            yield from (a.name for a in node.names if not a.name.endswith("Error"))
        elif isinstance(node, ast.Name | ast.Attribute) and isinstance(node.ctx, ast.Load):
            first, *rest = ast.unparse(node).split(".")
            name = ".".join([known.get(first, first), *rest])
            # Even unnamed as a call: a function may be handed on.
            if name in EXECUTERS | FORBIDDEN or name.rpartition(".")[2] in LOADERS:
                yield name
        if isinstance(node, ast.Call):
            yield from call_hazards(node, known)


def call_hazards(call, known):
    first, *rest = ast.unparse(call.func).split(".")
    name = ".".join([known.get(first, first), *rest])
    keywords = {k.arg: ast.unparse(k.value) for k in call.keywords}
    if name == "torch.load" and keywords.get("weights_only") != "True":
        yield name
    if keywords.get("allow_pickle", "False") != "False":
        yield f"{name}(allow_pickle=…)"
    if name in ("numpy.load", "numpy.lib.format.read_array") and len(call.args) > 2:
        yield f"{name}: allow_pickle by position"


def test_data_is_never_executed():
    """Law 9: no pickle, no eval; torch.load only with weights_only=True."""
    for module, tree in MODULES.items():
        assert list(hazards(tree)) == [], module


@pytest.mark.parametrize(
    "code",
    [
        "eval(text)",
        "exec(text)",
        "compile(text, '', 'exec')",
        "__import__(name)",
        "map(eval, x)",
        "import pickle",
        "import pickle as p",
        "from pickle import loads",
        "import dill, json",
        "from pickle import Unpickler",
        "import joblib",
        "from joblib import load",
        "import marshal",
        "import shelve",
        "import cloudpickle.cloudpickle",
        "from _pickle import loads as l",
        "def f():\n    import pickle",
        "np.load(f, allow_pickle=True)",
        "np.load(f, None, True)",
        "np.load(f, allow_pickle=flag)",
        "pd.read_pickle(f)",
        "frame.read_pickle(f)",
        "from pandas import read_pickle as r\nr(f)",
        "torch.load(f)",
        "torch.load(f, weights_only=False)",
        "torch.load(f, weights_only=flag)",
        "torch.load(f, **options)",
        "from torch import load\nload(f)",
        "import torch as t\nt.load(f)",
        "torch.jit.load(f)",
        "torch.hub.load(a, b)",
        "yaml.load(f)",
        "yaml.unsafe_load(f)",
        "from yaml import full_load\nfull_load(f)",
        "Task.load_from_checkpoint(f)",
    ],
)
def test_the_search_for_hazards_finds(code):
    assert list(hazards(ast.parse(code)))


@pytest.mark.parametrize(
    "code",
    [
        "torch.load(f, weights_only=True)",
        "np.load(f)",
        "np.load(f, allow_pickle=False)",
        "from pickle import UnpicklingError",
        "yaml.safe_load(f)",
        "re.compile(x)",
        "json.load(f)",
        "import importlib\nimportlib.import_module('kelp.config')",
        "net.eval()",
        "load(path)",
    ],
)
def test_the_search_for_hazards_leaves_alone(code):
    assert not list(hazards(ast.parse(code)))
