"""The rules of the repository's structure: sizes, and which folder may import which."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
CORE = ["clip.py", "tokenizer.py", "llama.py", "llava.py", "generate.py", "load_weights.py"]
# Each folder or root file may import everything above it, and from its own group only what WITHIN_A_GROUP allows.
ORDER = [
    ["hub"],
    ["clip", "tokenizer", "llama", "load_weights", "generate"],
    ["quantize", "family"],
    ["kernels"],
    ["llava"],
    ["training"],
    ["evaluation"],
    ["train", "evaluate"],
]
RANK = {room: rank for rank, rooms in enumerate(ORDER) for room in rooms}
WITHIN_A_GROUP = {("generate", "llama"), ("generate", "tokenizer")}
# Beside them: these get the model and the processor as arguments, and never import llava or what imports it.
BESIDE = {"playground": {"hub", "clip", "tokenizer", "llama", "generate"}}
BESIDE["cli"] = BESIDE["playground"] | {"playground", "quantize", "load_weights"}
RUNS_A_COMMAND = {"llava", "train", "evaluate", "quantize", "training", "evaluation"}  # their last lines may use cli


def source_files() -> list[Path]:
    outside = {"tests", "benchmarks", "notebooks", ".venv", "runs"}
    paths = [path.relative_to(ROOT) for path in ROOT.rglob("*.py")]
    return sorted(path for path in paths if path.parts[0] not in outside and not path.parts[0].startswith("."))


FILES = source_files()
ROOMS = {path.parts[0].removesuffix(".py") for path in FILES}


def imports(path: Path) -> set[str]:
    """The folders and root files that a file imports, at its top, in functions and in its last lines.

    The last lines of quantize.py are a command, which passes the model's class to cli; the module has a lower rank.
    """
    found, tree = set(), ast.parse((ROOT / path).read_text())
    if path.name == "quantize.py":
        tree.body = [node for node in tree.body if not ast.unparse(node).startswith("if __name__ ==")]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found.add(node.module.partition(".")[0])
    return found & ROOMS - {path.parts[0].removesuffix(".py")}


def may_import(room: str, other: str) -> bool:
    if room in BESIDE:
        return other in BESIDE[room]
    if other == "cli":
        return room in RUNS_A_COMMAND
    return RANK.get(other, 99) < RANK[room] or (room, other) in WITHIN_A_GROUP


@pytest.mark.quick
@pytest.mark.parametrize("path", FILES, ids=str)
def test_imports_point_one_way(path):
    room = path.parts[0].removesuffix(".py")
    assert room in RANK or room in BESIDE, f"{room} is a new folder or root file: give it a place in ORDER"
    wrong = sorted(other for other in imports(path) if not may_import(room, other))
    assert not wrong, f"{path} imports {', '.join(wrong)}"


@pytest.mark.quick
def test_only_llava_of_the_core_speaks_of_kernels():
    assert [name for name in CORE if "kernels" in (ROOT / name).read_text()] == ["llava.py"]


@pytest.mark.quick
def test_the_core_can_be_read_in_one_evening():
    assert sum(len((ROOT / name).read_text().splitlines()) for name in CORE) <= 1250


@pytest.mark.quick
@pytest.mark.parametrize("path", FILES, ids=str)
def test_files_and_functions_are_short(path):
    source = (ROOT / path).read_text()
    assert len(source.splitlines()) <= 400
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef):
            body = node.body[1:] if ast.get_docstring(node) and len(node.body) > 1 else node.body
            length = body[-1].end_lineno - body[0].lineno + 1
            assert length <= 40, f"{path}: {node.name} has {length} lines"


@pytest.mark.quick
def test_few_files_at_the_root():
    assert len(list(ROOT.glob("*.py"))) <= 10


@pytest.mark.quick
def test_every_room_of_more_than_three_files_says_what_is_in_it():
    for room in sorted({path.parts[0] for path in FILES if len(path.parts) > 1}):
        files = [path for path in FILES if path.parts[:-1] == (room,) and path.name != "__init__.py"]
        if len(files) > 3:
            readme = (ROOT / room / "README.md").read_text()
            missing = [path.name for path in files if path.name not in readme]
            assert not missing, f"{room}/README.md does not name {', '.join(missing)}"


def test_importing_llava_loads_little():
    code = (
        "import llava, sys; from pathlib import Path;"
        "files = [Path(m.__file__) for m in list(sys.modules.values()) if getattr(m, '__file__', None)];"
        f"ours = [f for f in files if f.is_relative_to({str(ROOT)!r}) and '.venv' not in f.parts];"
        "print(sum(len(f.read_text().splitlines()) for f in ours), *sorted(f.name for f in ours))"
    )
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert int(out.split()[0]) <= 1800, out


@pytest.mark.quick
def test_test_files_have_unique_names():  # pytest imports them by name, because they have no __init__.py
    names = [path.name for path in (ROOT / "tests").rglob("*.py") if path.name != "conftest.py"]
    assert len(names) == len(set(names)) and "__init__.py" not in names


def test_ruff_finds_nothing():
    done = subprocess.run([sys.executable, "-m", "ruff", "check", ROOT], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
