"""Definitions that stand in several scripts stay equal.

A script imports nothing of the project but `edm`; what several need stands in each. Such a copy carries a comment right
above it, `# Copied from synther_td3bc.load_dataset`, and where names must differ, `# Copied from module.name with A->B`
or `with A->B, C->D`. Here every copy is compared with its source, syntax tree by syntax tree. A definition that has to
differ from its namesake carries `# Differs from module.name: the reason`.
"""

import ast
import difflib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FILES = sorted(ROOT.glob("*.py"))
OWN = {"main", "Args", "DEFAULTS", "resolve", "check_args"}  # every script has its own
MARK = re.compile(r"# Copied from (\w+)\.(\w+)(?: with (\S+->\S*(?:, \S+->\S*)*))?")
DIFFERS = re.compile(r"# Differs from (\w+)\.(\w+): \w.*")
DEFINITIONS = (ast.FunctionDef, ast.ClassDef, ast.Assign, ast.AnnAssign)


def definitions(path):
    """{name: (node, first line)} of the functions, classes and assignments at the top level of a file."""
    found = {}
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, DEFINITIONS):
            first = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))])
            targets = [node] if hasattr(node, "name") else getattr(node, "targets", None) or [node.target]
            for target in targets:
                found[getattr(target, "name", None) or ast.unparse(target)] = (node, first)
    return found


def find_marks(path):
    """[(line number, text of the mark)]: all lines that look like one."""
    lines = path.read_text().splitlines()
    looks = re.compile(r"\s*#\s*(copied|differs) from", re.I)
    return [(number, line) for number, line in enumerate(lines, 1) if looks.match(line)]


def rename(code, pairs):
    for old, new in (pair.split("->") for pair in pairs.split(", ") if pair):
        start, end = (r"\b" if re.match(r"\w", c) else "" for c in (old[0], old[-1]))
        code = re.sub(start + re.escape(old) + end, new, code)
    return code


def check_copy(path, number, text):
    """What is wrong with the mark in this line; an empty string if nothing."""
    where = f"{path.name}:{number}"
    mark = MARK.fullmatch(text) or DIFFERS.fullmatch(text)
    if not mark:
        return f"{where}: cannot read {text!r}"
    module, name = mark[1], mark[2]
    copy = next((node for node, first in definitions(path).values() if first == number + 1), None)
    source_path = path.with_name(f"{module}.py")
    source = definitions(source_path).get(name, (None,))[0] if source_path.exists() else None
    if copy is None:
        return f"{where}: no definition right below the mark"
    if source is None or source_path == path:
        return f"{where}: there is no {module}.{name} to copy from"
    if mark.re == DIFFERS:
        same = ast.dump(source) == ast.dump(copy)
        return f"{where}: {name} does not differ from {module}.{name}" if same else ""
    pairs = mark[3] or ""
    source_code, copy_code = rename(ast.unparse(source), pairs), ast.unparse(copy)
    if ast.dump(ast.parse(source_code)) == ast.dump(ast.parse(copy_code)):
        return ""
    diff = difflib.unified_diff(
        source_code.splitlines(), copy_code.splitlines(), f"{module}.{name} (renamed: {pairs})", where, lineterm=""
    )
    return "\n".join(diff)


def unmarked_twins(paths):
    """Functions and classes of the same name in two files, of which more than one carries no mark."""
    originals = {}
    for path in paths:
        marked = {number + 1 for number, _ in find_marks(path)}
        for name, (node, first) in definitions(path).items():
            if hasattr(node, "name") and name not in OWN and first not in marked:
                originals.setdefault(name, []).append(f"{path.name}:{first}")
    return {name: places for name, places in originals.items() if len(places) > 1}


@pytest.mark.parametrize(
    "path, number, text",
    [pytest.param(path, *mark, id=f"{path.name}:{mark[0]}") for path in FILES for mark in find_marks(path)],
)
def test_copy_equals_its_source(path, number, text):
    problem = check_copy(path, number, text)
    assert not problem, problem


def test_no_definition_stands_twice_without_a_mark():
    assert not unmarked_twins(FILES)


# --- The check itself -------------------------------------------------------------------------------------------------

SOURCE = '''
LIMITS = (1, 2)

@cache
def load(path):
    """Load a path."""
    if not path:
        raise edm.RunError("no load")
    return path  # as it is
'''


@pytest.mark.parametrize(
    "copy, problem",
    [
        ("# Copied from source.LIMITS\nLIMITS = (1,\n    2)", None),
        ("# Copied from source.LIMITS\nLIMITS = (1, 3)", "-LIMITS = (1, 2)\n+LIMITS = (1, 3)"),
        ("# Copied from source.LIMITS with LIMITS->BOUNDS\nBOUNDS = (1, 2)", None),
        ("# Copied from source.load" + SOURCE[17:], None),
        ("# Copied from source.load" + SOURCE[17:].replace("# as it is", ""), None),
        ("# Copied from source.load" + SOURCE[17:].replace("return path", "return None"), "+    return None"),
        ("# Copied from source.load" + SOURCE[17:].replace("Load a", "Save a"), "Save a path"),
        ("# Copied from source.load" + SOURCE[17:].replace("@cache\n", ""), "-@cache"),
        ("# Copied from source.load with edm.RunError->RunError" + SOURCE[17:].replace("edm.", ""), None),
        (
            "# Copied from source.load with edm.->, path->file"
            + SOURCE[17:].replace("edm.", "").replace("path", "file"),
            None,
        ),
        ("# Copied from source.load with pat->fil" + SOURCE[17:].replace("path", "file"), "-def load(path)"),
        ("# Copied from source.load\n" + SOURCE[17:], "no definition right below"),
        ("# Copied from source.store" + SOURCE[17:], "no source.store"),
        ("# Copied from nowhere.load" + SOURCE[17:], "no nowhere.load"),
        ("# copied from source.load:" + SOURCE[17:], "cannot read"),
        ("# Differs from source.load: a reason" + SOURCE[17:].replace("return path", "return None"), None),
        ("# Differs from source.load: a reason" + SOURCE[17:], "does not differ"),
        ("# Differs from source.store: a reason" + SOURCE[17:], "no source.store"),
        ("# Differs from source.load" + SOURCE[17:].replace("return path", "return None"), "cannot read"),
    ],
)
def test_check_of_a_copy(tmp_path, copy, problem):
    assert SOURCE[17:].startswith("\n@cache")
    (tmp_path / "source.py").write_text(SOURCE)
    path = tmp_path / "copy.py"
    path.write_text(copy)
    ((number, text),) = find_marks(path)
    found = check_copy(path, number, text)
    assert problem in found if problem else not found


def test_check_of_twins(tmp_path):
    first, second = tmp_path / "first.py", tmp_path / "second.py"
    first.write_text("X = 1\ndef f(): pass\nclass C: pass\ndef main(): pass\n")
    second.write_text("X = 2\n# Copied from first.f\ndef f(): pass\ndef main(): return 1\ndef g(): f()\n")
    assert not unmarked_twins([first, second])
    second.write_text("def f(): pass\nclass C: pass\n")
    assert unmarked_twins([first, second]) == {"f": ["first.py:2", "second.py:1"], "C": ["first.py:3", "second.py:2"]}
