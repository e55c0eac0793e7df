"""The three links and the three lines in pyproject.toml say the same, and imports flow one way."""

import ast
import io
import subprocess
import sys
import tokenize
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FUNCTION = ast.FunctionDef | ast.AsyncFunctionDef
SETUP = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
MAPPING: dict[str, str] = SETUP["package-dir"]
LEAVES = ("attacks", "defenses", "reports")
# start at once, also on a machine without torch
LIGHT = (
    "analysis.papers.comparison",
    "analysis.papers.declaration",
    "analysis.papers.on_maps",
    "analysis.papers.over_seeds",
    "analysis.papers.results",
    "cli",
    "errors",
    "progress",
    "registry",
    "testing",
    "testing.plugin",
    "runs.archives",
    "runs.cache_folder",
    "runs.detector_record",
    "runs.explanation_record",
    "runs.folder",
    "runs.metrics",
    "runs.plain",
    "runs.reading",
    "runs.statistics",
    "runs.storage",
    "runs.types",
)


@pytest.mark.parametrize("package", [name for name in MAPPING if "." in name])
def test_each_link_points_at_the_mapped_folder(package: str) -> None:
    """Tools that read the tree see what is installed."""
    link = ROOT.joinpath(*package.split("."))
    if link.is_file():
        pytest.skip("this checkout has no symbolic links")
    assert link.is_symlink()
    assert link.resolve() == ROOT / MAPPING[package]


def test_every_package_is_listed() -> None:
    """Automatic discovery does not look behind a mapping."""
    folders = {path.parent for path in (ROOT / "robusteval").glob("**/__init__.py")}
    inner = {".".join(folder.relative_to(ROOT).parts) for folder in folders}

    assert set(SETUP["packages"]) == inner | set(MAPPING)


def imports(path: Path, *, everywhere: bool) -> set[str]:
    """Absolute names of what a file imports, at module level or everywhere."""
    tree = ast.parse(path.read_text())
    found: set[str] = set()
    for node in ast.walk(tree) if everywhere else tree.body:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def is_below(name: str, packages: tuple[str, ...]) -> bool:
    return any(name == package or name.startswith(package + ".") for package in packages)


# from the top down; each may import only what stands below it
FLOORS = (
    ("cli", "testing"),
    ("commands",),
    ("analysis",),
    ("evaluation",),
    ("interpreters",),
    ("art",),
    ("search",),
    ("models",),
    ("datasets",),
    ("registry", "progress"),
    ("runs",),
    ("errors",),
)
ABOVE = {
    room: {above for higher in FLOORS[: i + 1] for above in higher}
    for i, floor in enumerate(FLOORS)
    for room in floor
}


@pytest.mark.parametrize("room", ABOVE)
def test_imports_go_down(room: str) -> None:
    """Lazy ones inside functions, too."""
    files = [ROOT / "robusteval" / f"{room}.py", *(ROOT / "robusteval" / room).glob("**/*.py")]
    names = {name for file in files if file.is_file() for name in imports(file, everywhere=True)}
    rooms = {name.split(".")[1] for name in names if name.startswith("robusteval.")}

    assert not rooms & ABOVE[room] - {room}


CORE = sorted((ROOT / "robusteval").glob("**/*.py"))
FOLDERS = [path for leaf in LEAVES for path in sorted((ROOT / leaf).glob("*.py"))]


@pytest.mark.parametrize("path", CORE, ids=lambda path: str(path.relative_to(ROOT)))
def test_the_core_imports_no_leaf_at_module_level(path: Path) -> None:
    """The registry opens them by name, the command line inside its commands."""
    leaves = tuple(f"robusteval.{leaf}" for leaf in LEAVES)

    assert not [n for n in imports(path, everywhere=False) if is_below(n, leaves + LEAVES)]


@pytest.mark.parametrize("path", FOLDERS, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_leaf_imports_the_core_and_never_a_leaf(path: Path) -> None:
    """Inside a folder imports are relative; so no file spells where it is mounted."""
    leaves = tuple(f"robusteval.{leaf}" for leaf in LEAVES)

    assert not [n for n in imports(path, everywhere=True) if is_below(n, leaves + LEAVES)]


@pytest.mark.parametrize("path", FOLDERS, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_package_init_imports_nothing(path: Path) -> None:
    """A function re-exported under its module's name would hide the module."""
    if path.name == "__init__.py":
        assert not imports(path, everywhere=True)


def list_code_lines(source: str) -> set[int]:
    """The lines of a file that hold more than comments and docstrings."""
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type in (tokenize.NAME, tokenize.NUMBER, tokenize.OP, tokenize.STRING):
            lines |= set(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(source)):
        first = node.body[:1] if isinstance(node, ast.Module | ast.ClassDef | FUNCTION) else []
        if first and isinstance(first[0], ast.Expr) and isinstance(first[0].value, ast.Constant):
            lines -= set(range(first[0].lineno, (first[0].end_lineno or 0) + 1))
    return lines


@pytest.mark.parametrize("path", CORE + FOLDERS, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_file_and_no_class_is_too_long_to_be_read(path: Path) -> None:
    """Of classes the lines of code count."""
    source = path.read_text(encoding="utf-8")
    code = list_code_lines(source)
    classes = {
        node.name: len(code & set(range(node.lineno, (node.end_lineno or 0) + 1)))
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.ClassDef)
    }

    assert len(source.splitlines()) <= 450
    assert {name: lines for name, lines in classes.items() if lines > 150} == {}


def test_light_modules_load_neither_torch_nor_art() -> None:
    """Help, lists and reports start at once."""
    names = [f"robusteval.{name}" for name in LIGHT]
    commands = sorted((ROOT / "robusteval" / "commands").glob("[!_]*.py"))
    names += [f"robusteval.commands.{path.stem}" for path in commands]
    names += [f"robusteval.reports.{path.stem}" for path in (ROOT / "reports").glob("[!_]*.py")]
    code = (
        f"import sys, importlib\nfor name in {names}: importlib.import_module(name)\n"
        "print(sorted({'torch', 'art', 'scipy', 'sklearn', 'torchvision'} & set(sys.modules)))"
    )

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert done.stdout.strip() == "[]"


def test_art_is_imported_for_its_own_attacks_and_classes_alone() -> None:
    """It takes a second, a sixth of a gigabyte and a folder in the user's home."""
    names = [f"robusteval.attacks.{path.stem}" for path in (ROOT / "attacks").glob("[!_]*.py")]
    names += ["robusteval.evaluation.evaluate", "robusteval.commands.evaluate"]
    code = (
        f"import sys, importlib\nfor name in {names}: importlib.import_module(name)\n"
        "print(sorted({'art', 'torchvision'} & set(sys.modules)))\n"
        "from robusteval.attacks.pgd import PGD\n"
        "print(sorted({'art'} & set(sys.modules)))"
    )

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert done.stdout.split() == ["[]", "['art']"]


def test_importing_the_package_has_no_side_effects(tmp_path: Path) -> None:
    """No folder, no file, no random state."""
    code = (
        "import random; before = random.getstate()\n"
        "import robusteval, robusteval.attacks, robusteval.defenses, robusteval.reports, sys\n"
        "assert random.getstate() == before\n"
        "print([name for name in sys.modules if name.startswith('robusteval.')])"
    )

    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        cwd=tmp_path,
        env={"HOME": str(tmp_path)},
    )

    assert "robusteval.models.classifier" not in done.stdout
    assert not list(tmp_path.iterdir())
