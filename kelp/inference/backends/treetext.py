"""LightGBM's text model, read with suspicion.

LightGBM trusts its model files: a truncated one ends the whole process, and one with a wrong number
reads memory of others. So every number that it will follow is checked first, and it is given only
lines that were.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

_HEAD: Final = (
    "version",
    "num_class",
    "num_tree_per_iteration",
    "label_index",
    "max_feature_idx",
    "objective",
    "feature_names",
    "feature_infos",
)
_NODES: Final = ("split_feature", "threshold", "decision_type", "left_child", "right_child")
_MOST_LEAVES: Final = 1 << 16
_NUMERIC: Final = (0, 2, 4, 6, 8, 10)
"""Decision types of splits by size: an odd one would be by category."""


def checked_model(text: str, channels: int) -> str:
    """The model of a text, reduced to what prediction needs.

    Args:
        text: as LightGBM writes it.
        channels: numbers that it takes of each pixel.

    Raises:
        ValueError: the text is no such model of trees for one probability.
    """
    body, end, _ = text.partition("\nend of trees\n")
    head, *trees = re.split(r"^Tree=\d+\n", body, flags=re.MULTILINE)
    if not (end and trees and head.startswith("tree\n")):
        raise ValueError("it is incomplete")
    facts = _fields(head)
    wanted = {
        "version": "v4",
        "num_class": "1",
        "num_tree_per_iteration": "1",
        "max_feature_idx": str(channels - 1),
        "label_index": "0",
    }
    for name, value in wanted.items():
        if facts.get(name) != value:
            raise ValueError(f"{name} is {facts.get(name)}, not {value}")
    if facts.get("objective") != "binary sigmoid:1":
        raise ValueError("it does not give probabilities")
    for name in ("feature_names", "feature_infos"):
        if len(facts.get(name, "").split(" ")) != channels:
            raise ValueError(f"{name} are not {channels}")
    lines = ["tree", *(f"{name}={facts[name]}" for name in _HEAD)]
    for number, tree in enumerate(trees):
        # LightGBM finds a tree's end by an empty line.
        lines += ["", f"Tree={number}", *_checked_tree(_fields(tree), channels), "", ""]
    return "\n".join([*lines, "end of trees", "", ""])


def _fields(block: str) -> dict[str, str]:
    """What stands behind the names of a block's lines."""
    pairs = (line.partition("=") for line in block.splitlines())
    return {name: value for name, _, value in pairs}


def _checked_tree(fields: Mapping[str, str], channels: int) -> list[str]:
    leaves = int(fields.get("num_leaves", "0"))
    if not 1 <= leaves <= _MOST_LEAVES or fields.get("num_cat") != "0":
        raise ValueError("a tree has no leaves, or categories")
    if fields.get("is_linear", "0") != "0":
        raise ValueError("a tree is a linear one")
    lines = [f"num_leaves={leaves}", "num_cat=0"]
    names = _NODES if leaves > 1 else ()
    for name in names:
        kind = np.float64 if name == "threshold" else np.int64
        _numbers(fields, name, leaves - 1, kind)
        lines.append(f"{name}={fields[name]}")
    _numbers(fields, "leaf_value", leaves, np.float64)
    if names:
        _check_nodes(fields, leaves, channels)
    return [*lines, f"leaf_value={fields['leaf_value']}", "is_linear=0", "shrinkage=1"]


def _numbers(fields: Mapping[str, str], name: str, count: int, kind: Any) -> NDArray[Any]:
    try:
        numbers = np.array(fields.get(name, "").split(), dtype=kind)
    except OverflowError as error:
        raise ValueError(f"{name} has too large a number") from error
    if len(numbers) != count or not np.isfinite(numbers).all():
        raise ValueError(f"a tree has not {count} times {name}")
    return numbers


def _check_nodes(fields: Mapping[str, str], leaves: int, channels: int) -> None:
    """Every node and leaf must be met just once on the ways down, and only known things asked."""
    nodes = leaves - 1
    number = np.arange(nodes)
    children = []
    for name in ("left_child", "right_child"):
        child = _numbers(fields, name, nodes, np.int64)
        # A node comes after its parent, so that no way leads in a circle.
        if ((child >= 0) & (child <= number)).any():
            raise ValueError("a tree has a circle")
        children.append(child)
    met = np.sort(np.concatenate(children))
    if not np.array_equal(met, np.concatenate([np.arange(-leaves, 0), number[1:]])):
        raise ValueError("the nodes of a tree do not hang together")
    if not np.isin(_numbers(fields, "decision_type", nodes, np.int64), _NUMERIC).all():
        raise ValueError("a tree asks for categories")
    asked = _numbers(fields, "split_feature", nodes, np.int64)
    if not ((asked >= 0) & (asked < channels)).all():
        raise ValueError("a tree asks for a channel that is not there")
