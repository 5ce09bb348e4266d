"""Who imports whom, against the table of floors: no lower room knows an upper one."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]


def floors() -> dict[str, int]:
    """Return the floor of each root file and package, the lowest first, from the page on development."""
    found = {}
    page = (ROOT / "docs" / "development.md").read_text()
    rows = re.findall(r"^\| (\d) \| (.*) \|$", page, re.MULTILINE)
    for floor, names in rows:
        for name in re.findall(r"`(\w+)(?:/|\.py)`", names):
            found[name] = int(floor)
    return found


def imports_of(file: Path) -> set[str]:
    """Return the root files and packages that a file imports, inside functions too."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        if isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module.partition(".")[0])
    return found


def files_of(name: str) -> list[Path]:
    """Return the Python files of a root file's or a package's name."""
    if (ROOT / name).is_dir():
        return sorted((ROOT / name).rglob("*.py"))
    return [ROOT / f"{name}.py"]


def test_every_file_has_a_floor():
    known = floors()
    roots = {file.stem for file in ROOT.glob("*.py")}
    packages = {file.parent.name for file in ROOT.glob("*/*.py")} - {"tests"}
    assert roots | packages <= known.keys()
    assert all(file.exists() for name in known for file in files_of(name))
    assert len(roots) <= 11


def test_no_file_imports_from_a_floor_above_its_own():
    known = floors()
    upward = []
    for name, floor in known.items():
        for file in files_of(name):
            for imported in imports_of(file):
                if known.get(imported, 0) > floor:
                    upward.append(f"{file.relative_to(ROOT)} imports {imported}")
    assert not upward


def root_name(node: ast.AST) -> str | None:
    """Return the name that a chain such as NAME.a[0].b begins with; None: it begins with none."""
    while isinstance(node, (ast.Attribute, ast.Subscript)):
        node = node.value
    return node.id if isinstance(node, ast.Name) else None


def assignments_into_modules(file: Path, ours: set[str]) -> list[str]:
    """Return what a file assigns to attributes and entries of what it imports from files of ours."""
    imported = set()
    found = []
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names = [alias for alias in node.names if alias.name.partition(".")[0] in ours]
            imported |= {alias.asname or alias.name.partition(".")[0] for alias in names}
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] in ours:
            imported |= {alias.asname or alias.name for alias in node.names}
        if isinstance(node, (ast.Attribute, ast.Subscript)) and not isinstance(node.ctx, ast.Load):
            found.append((root_name(node), ast.unparse(node)))
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("setattr", "delattr"):
            found.append((root_name(node.args[0]), ast.unparse(node)))
    return [text for root, text in found if root in imported]


def test_no_program_assigns_into_another_module(tmp_path):
    """A study that changes a module from outside shows nothing of what it changes to a reader."""
    programs = files_of("study") + files_of("benchmarks")
    ours = floors().keys() | {file.stem for file in programs}
    for file in programs:
        assert not assignments_into_modules(file, ours), file
    bad = tmp_path / "bad.py"
    bad.write_text(
        "import train_rl\nfrom worlds import toy\nfrom infra import record as r\nimport os\n"
        "train_rl.score = 1\ntoy.PRESETS['a']['b'] = 2\nr.keep += 1\nsetattr(toy, 'c', 3)\n"
        "del toy.d\nos.environ['e'] = '4'\nown = toy.f\nown.g = 5\n"
    )
    found = assignments_into_modules(bad, ours)
    assert sorted(found) == sorted(
        ["train_rl.score", "toy.PRESETS['a']['b']", "r.keep", "setattr(toy, 'c', 3)", "toy.d"]
    )


def test_the_algorithm_imports_no_file_of_ours():
    assert not imports_of(ROOT / "rlfr.py") & floors().keys()
