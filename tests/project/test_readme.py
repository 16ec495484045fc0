"""What the project promises its readers about itself."""

import ast
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
CORE = ["clip.py", "tokenizer.py", "llama.py", "llava.py", "generate.py", "load_weights.py"]
OURS = {
    "clip",
    "checkpoint",
    "explain",
    "tokenizer",
    "llama",
    "llava",
    "generate",
    "decode_graph",
    "text_watcher",
    "kernels",
    "load_weights",
    "quantize",
    "memory",
    "answers",
    "arguments",
    "chat",
    "command",
    "save_checkpoint",
    "emoji_world",
    "batches",
    "losses",
    "judge",
    "train",
}
# a module -> which of ours it may import; what is not named here may use everything
MAY_IMPORT = {
    "clip": {"kernels"},
    "checkpoint": set(),
    "tokenizer": {"checkpoint"},
    "text_watcher": {"tokenizer"},
    "llama": {"clip", "kernels"},
    "decode_graph": {"kernels"},
    "generate": {"llama", "tokenizer", "text_watcher", "decode_graph"},
    "quantize": {"kernels", "llama"},
    "load_weights": {"checkpoint", "quantize"},
    "llava": {"clip", "checkpoint", "tokenizer", "kernels", "llama", "generate", "load_weights"},
    "explain": {"generate", "tokenizer"},
    "chat": {"clip", "generate", "llama", "text_watcher"},
    "answers": {"clip", "generate", "text_watcher"},
    "arguments": {"tokenizer"},
    "memory": {"llava", "quantize"},
}
KERNELS = sorted(path.relative_to(ROOT).as_posix() for path in ROOT.glob("kernels/*.py"))
FILES = sorted(path.relative_to(ROOT).as_posix() for path in ROOT.glob("*.py")) + KERNELS


def test_the_core_can_be_read_in_one_evening():
    assert sum(len((ROOT / name).read_text().splitlines()) for name in CORE) <= 1500


@pytest.mark.parametrize("name", FILES)
def test_no_function_is_longer_than_40_lines(name):
    for node in ast.walk(ast.parse((ROOT / name).read_text())):
        if isinstance(node, ast.FunctionDef):
            body = node.body[1:] if ast.get_docstring(node) and len(node.body) > 1 else node.body
            length = body[-1].end_lineno - body[0].lineno + 1
            assert length <= 40, f"{name}: {node.name} has {length} lines"


@pytest.mark.parametrize("name", MAY_IMPORT)
def test_imports_point_one_way(name):
    tree = ast.parse((ROOT / f"{name}.py").read_text())
    imported = {node.module for node in tree.body if isinstance(node, ast.ImportFrom)}
    imported |= {alias.name for node in tree.body if isinstance(node, ast.Import) for alias in node.names}
    assert imported & OURS <= MAY_IMPORT[name]


@pytest.mark.parametrize("name", KERNELS)
def test_kernels_import_nothing_else_of_ours(name):
    modules = [node.module or "" for node in ast.walk(ast.parse((ROOT / name).read_text())) if hasattr(node, "module")]
    assert {module.partition(".")[0] for module in modules} & OURS <= {"kernels"}


def test_ruff_finds_nothing():
    done = subprocess.run([sys.executable, "-m", "ruff", "check", ROOT], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_ci_runs_the_readmes_test_command():
    command = (ROOT / ".ci" / "run").read_text().splitlines()[-1]
    assert command in README.splitlines()


SESSIONS = re.findall(r"^\$ (python .*)\n((?:(?!```|\$ ).*\n)*)", README, re.M)  # a command, and what is shown below it


@pytest.mark.parametrize(("command", "shown"), SESSIONS, ids=[command for command, _ in SESSIONS])
def test_the_readme_shows_what_its_commands_really_print(command, shown):
    command = command.replace("python", shlex.quote(sys.executable), 1)
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == shown.strip()


def test_the_readme_shows_something():
    assert len(SESSIONS) >= 3


def test_the_readmes_python_code_runs(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    for code in re.findall(r"```python\n(.*?)```", README, re.DOTALL):
        exec(code, {})
    assert "a rocket on a black background" in capsys.readouterr().out
