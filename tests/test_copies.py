"""Definitions that stand in several scripts stay equal.

A script imports nothing of the project but `edm`. What several need stands in each, under a comment
that names its source: `# Copied from synther_td3bc.evaluate`. Here every copy is compared with its
source. A definition that has to differ carries `# Differs from module.name: the reason`.
"""

import ast
import difflib
import itertools
import re
from pathlib import Path

import pytest

FILES = sorted(Path(__file__).resolve().parents[1].glob("*.py"))
MARK = re.compile(r"# (Copied|Differs) from (\w+)\.(\w+)(: \w.*)?")
OWN = ("main", "Args", "DEFAULTS")  # every script has its own


def definitions(path):
    """{line of its beginning: (name, text)} of the functions, classes and assignments of a file."""
    text = path.read_text()
    found = {}
    for node in ast.parse(text).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.Assign)):
            name = node.name if hasattr(node, "name") else ast.unparse(node.targets[0])
            first = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))])
            found[first] = (name, "\n".join(text.splitlines()[first - 1 : node.end_lineno]))
    return found


TEXTS = {}  # (module, name): text
SOURCES = {}  # (module, name): the (module, name) that its mark names, or itself
MARKS = []
for path in FILES:
    lines = path.read_text().splitlines()
    for first, (name, text) in definitions(path).items():
        mark = MARK.fullmatch(lines[first - 2])
        TEXTS[path.stem, name] = text
        SOURCES[path.stem, name] = mark.group(2, 3) if mark else (path.stem, name)
    for number, line in enumerate(lines, 1):
        if re.match(r"\s*#\s*(copied|differs) from", line, re.I):
            MARKS.append(pytest.param(path, number, line, id=f"{path.stem}:{number}"))


@pytest.mark.parametrize("path, number, line", MARKS)
def test_copy_equals_its_source(path, number, line):
    kind, module, source, reason = MARK.fullmatch(line).groups()
    name, text = definitions(path)[number + 1]
    assert module != path.stem
    assert SOURCES[module, source] == (module, source)  # it is no copy itself
    if kind == "Copied":
        assert name == source and reason is None and text == TEXTS[module, source]
    else:
        assert reason and text != TEXTS[module, source]


def test_no_name_stands_twice_without_a_mark():
    originals = [name for (module, name), source in SOURCES.items() if source == (module, name)]
    assert {name for name in originals if originals.count(name) > 1} <= set(OWN)
    assert len(MARKS) > 20


def test_no_near_copies_without_a_mark():
    """Functions and classes of six lines or more, whatever their names, by the words they share."""
    long = [key for key, text in TEXTS.items() if key[1] not in OWN and text.count("\n") >= 5]
    for a, b in itertools.combinations(long, 2):
        if a[0] != b[0] and SOURCES[a] != SOURCES[b]:
            matcher = difflib.SequenceMatcher(None, TEXTS[a].split(), TEXTS[b].split(), False)
            assert matcher.quick_ratio() <= 0.7 or matcher.ratio() <= 0.7, (a, b)
