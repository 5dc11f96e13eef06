"""Definitions that stand in several scripts stay equal.

A script imports nothing of the project but `edm`. What several need stands in each, under a comment that names its
source: `# Copied from synther_td3bc.evaluate`. Here every copy is compared with its source. A definition that has to
differ from its namesake carries `# Differs from module.name: the reason`.
"""

import ast
import re
from pathlib import Path

import pytest

FILES = sorted(Path(__file__).resolve().parents[1].glob("*.py"))
MARK = re.compile(r"# (Copied|Differs) from (\w+)\.(\w+)(: \w.*)?")


def definitions(path):
    """{line of its beginning: (name, source)} of the functions, classes and assignments at the top level of a file."""
    text, found = path.read_text(), {}
    for node in ast.parse(text).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.Assign)):
            name = node.name if hasattr(node, "name") else ast.unparse(node.targets[0])
            first = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))])
            found[first] = name, "\n".join(text.splitlines()[first - 1 : node.end_lineno])
    return found


SOURCES = {path.stem: {name: source for name, source in definitions(path).values()} for path in FILES}
MARKS = [
    pytest.param(path, line, text, id=f"{path.stem}:{line}")
    for path in FILES
    for line, text in enumerate(path.read_text().splitlines(), 1)
    if re.match(r"\s*#\s*(copied|differs) from", text, re.I)
]


@pytest.mark.parametrize("path, line, text", MARKS)
def test_copy_equals_its_source(path, line, text):
    kind, module, name, reason = MARK.fullmatch(text).groups()
    copy = definitions(path)[line + 1]
    assert path.stem != module and copy[0] == name and (kind == "Differs") == bool(reason)
    if kind == "Copied":
        assert copy[1] == SOURCES[module][name]
    else:
        assert copy[1] != SOURCES[module][name]


def test_no_definition_stands_twice_without_a_mark():
    """But for main, Args and DEFAULTS, which every script has for itself."""
    originals = []
    for path in FILES:
        lines = path.read_text().splitlines()
        originals += [name for first, (name, _) in definitions(path).items() if not MARK.fullmatch(lines[first - 2])]
    twice = {name for name in originals if originals.count(name) > 1}
    assert twice <= {"main", "Args", "DEFAULTS"} and len(MARKS) > 20
