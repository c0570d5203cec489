"""The floors of the house: a module imports only from its own floor or from below."""

import ast
import sys
from pathlib import Path

import pytest

import kelp

ROOT = Path(kelp.__file__).parent

# The floor of a module is that of its longest prefix here; ARCHITECTURE.md shows the same table.
FLOORS = {
    "kelp": 0,
    "kelp.errors": 0,
    "kelp.progress": 0,
    "kelp.files": 0,
    "kelp.bands": 0,
    "kelp.grid": 0,
    "kelp.indices": 0,
    "kelp.merge": 0,
    "kelp.agreement": 0,
    "kelp.thresholds": 0,
    "kelp.weighting": 0,
    "kelp.seams": 0,
    "kelp.summary": 0,
    "kelp.config": 1,
    "kelp.store": 1,
    "kelp.raster": 1,
    "kelp.writer": 1,
    "kelp.area": 1,
    "kelp.scene": 1,
    "kelp.manifest": 1,
    "kelp.workers": 1,
    "kelp.cluster": 1,
    "kelp.statsfile": 1,
    "kelp.sensors": 2,
    "kelp.stats": 2,
    "kelp.catalogue": 2,
    "kelp.rendering": 2,
    "kelp.canvas": 2,
    "kelp.sheets": 2,
    "kelp.preview": 2,
    "kelp.submission": 2,
    "kelp.ensembling": 2,
    "kelp.scoring": 2,
    "kelp.report": 2,
    "kelp.console": 2,
    "kelp.data_prep": 3,
    "kelp.simulation": 3,
    "kelp.nn": 3,
    "kelp.nn.training": 4,
    "kelp.nn.inference": 4,
    "kelp.nn.search": 5,
    "kelp.nn.comparison": 5,
    "kelp.reporting": 6,
    "kelp.demo": 6,
    "kelp.cli": 6,
    "kelp.__main__": 7,
    "kelp.data_prep.__main__": 7,
    "kelp.nn.training.__main__": 7,
    "kelp.nn.inference.__main__": 7,
}
PURE = [name for name, floor in FLOORS.items() if floor == 0]


def floor(module):
    while module not in FLOORS:
        module = module.rpartition(".")[0]
    return FLOORS[module]


def modules():
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT.parent).with_suffix("").parts
        yield ".".join(parts).removesuffix(".__init__"), ast.parse(path.read_text())


MODULES = dict(modules())


def imports(tree, top_level_only=False):
    """Names of the modules that a tree imports, wherever in the file."""
    for node in tree.body if top_level_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                yield full if full in MODULES else node.module


# The package itself only names, for type checkers, what it imports on first use.
@pytest.mark.parametrize("module", [name for name in MODULES if name != "kelp"])
def test_imports_point_down(module):
    for name in imports(MODULES[module]):
        if name.split(".")[0] == "kelp":
            assert floor(name) <= floor(module), f"{module} imports {name} from a floor above"


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


@pytest.mark.parametrize("module", PURE)
def test_the_ground_floor_needs_numpy_and_scipy_at_most(module):
    allowed = {"numpy", "scipy", "kelp", "__future__", *sys.stdlib_module_names}
    for name in imports(MODULES[module]):
        assert name.split(".")[0] in allowed, f"{module} imports {name}"


@pytest.mark.parametrize("heavy", ["torch", "lightning", "mlflow", "timm"])
def test_only_the_network_rooms_know_torch(heavy):
    for module, tree in MODULES.items():
        if not module.startswith("kelp.nn"):
            assert heavy not in {name.split(".")[0] for name in imports(tree)}, module


def test_training_and_prediction_do_not_know_each_other():
    for module, tree in MODULES.items():
        for one, other in (("training", "inference"), ("inference", "training")):
            if module.startswith(f"kelp.nn.{one}"):
                assert not any(name.startswith(f"kelp.nn.{other}") for name in imports(tree))


def test_no_module_hides_a_public_function():
    """`import kelp.predict` would replace the function `kelp.predict`."""
    top = {name.split(".")[1] for name in MODULES if name.count(".") >= 1}
    assert not top & set(kelp.__all__)


UNPICKLERS = {"pickle", "cPickle", "_pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
EXECUTERS = {"eval", "exec", "compile", "__import__", "execfile"}
# Functions by their last name, on whatever they are called.
LOADERS = {
    "read_pickle", "unsafe_load", "full_load", "unsafe_load_all", "full_load_all",
    "load_from_checkpoint", "Unpickler", "find_class", "load_module", "exec_module",
}  # fmt: skip
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


@pytest.mark.parametrize("code", [
    "eval(text)", "exec(text)", "compile(text, '', 'exec')", "__import__(name)", "map(eval, x)",
    "import pickle", "import pickle as p", "from pickle import loads", "import dill, json",
    "from pickle import Unpickler", "import joblib", "from joblib import load", "import marshal",
    "import shelve", "import cloudpickle.cloudpickle", "from _pickle import loads as l",
    "def f():\n    import pickle", "np.load(f, allow_pickle=True)", "np.load(f, None, True)",
    "np.load(f, allow_pickle=flag)", "pd.read_pickle(f)", "frame.read_pickle(f)",
    "from pandas import read_pickle as r\nr(f)",
    "torch.load(f)", "torch.load(f, weights_only=False)",
    "torch.load(f, weights_only=flag)", "torch.load(f, **options)",
    "from torch import load\nload(f)",
    "import torch as t\nt.load(f)", "torch.jit.load(f)", "torch.hub.load(a, b)", "yaml.load(f)",
    "yaml.unsafe_load(f)", "from yaml import full_load\nfull_load(f)",
    "Task.load_from_checkpoint(f)",
])  # fmt: skip
def test_the_search_for_hazards_finds(code):
    assert list(hazards(ast.parse(code)))


@pytest.mark.parametrize("code", [
    "torch.load(f, weights_only=True)", "np.load(f)", "np.load(f, allow_pickle=False)",
    "from pickle import UnpicklingError", "yaml.safe_load(f)", "re.compile(x)", "json.load(f)",
    "import importlib\nimportlib.import_module('kelp.config')", "net.eval()", "load(path)",
])  # fmt: skip
def test_the_search_for_hazards_leaves_alone(code):
    assert not list(hazards(ast.parse(code)))
