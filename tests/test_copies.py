"""Definitions that stand in several scripts stay equal.

A script imports nothing of the project but `edm`. What several need stands in each, under a comment
that names its source: `# Copied from synther_td3bc.evaluate`. Here every copy is compared with its
source. A definition that has to differ carries `# Differs from module.name: the reason`.
"""

import ast
import difflib
import itertools
import re
from collections import Counter
from pathlib import Path

import pytest

FILES = sorted(Path(__file__).resolve().parents[1].glob("*.py"))
MARK = re.compile(r"# (Copied|Differs) from (\w+)\.(\w+)(: \w.*)?")
OWN = ("main", "Args", "DEFAULTS")  # every script has its own


TEXTS = {}  # (module, name): text of a function, a class or an assignment
MARKS = {}  # (module, name): kind, module and name of its source, reason
NUMBERS = Counter()  # module: how many lines look like a mark
for path in FILES:
    lines = path.read_text().splitlines()
    looks = [line for line in lines if re.match(r"\s*#\s*(copied|differs) from", line, re.I)]
    NUMBERS[path.stem] = len(looks)
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.Assign)):
            name = node.name if hasattr(node, "name") else ast.unparse(node.targets[0])
            first = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))])
            TEXTS[path.stem, name] = "\n".join(lines[first - 1 : node.end_lineno])
            mark = MARK.fullmatch(lines[first - 2])
            if mark:
                MARKS[path.stem, name] = mark.groups()


@pytest.mark.parametrize("module, name", MARKS)
def test_copy_equals_its_source(module, name):
    kind, *source, reason = MARKS[module, name]
    source = tuple(source)
    assert source[0] != module and source not in MARKS  # it is no copy itself
    if kind == "Copied":
        assert name == source[1] and not reason and TEXTS[module, name] == TEXTS[source]
    else:
        assert reason and TEXTS[module, name] != TEXTS[source]


def test_no_name_stands_twice_without_a_mark():
    originals = [name for module, name in TEXTS if (module, name) not in MARKS]
    assert {name for name in originals if originals.count(name) > 1} <= set(OWN)
    assert Counter(module for module, _ in MARKS) == NUMBERS and len(MARKS) > 20


def test_no_near_copies_without_a_mark():
    """Functions and classes of six lines or more, whatever their names, by the words they share."""
    long = [key for key, text in TEXTS.items() if key[1] not in OWN and text.count("\n") >= 5]
    source = {key: MARKS[key][1:3] if key in MARKS else key for key in long}
    for a, b in itertools.combinations(long, 2):
        if a[0] != b[0] and source[a] != source[b]:
            matcher = difflib.SequenceMatcher(None, TEXTS[a].split(), TEXTS[b].split(), False)
            assert matcher.quick_ratio() <= 0.7 or matcher.ratio() <= 0.7, (a, b)
