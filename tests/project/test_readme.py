"""What the README promises: its commands print what it shows, its edits do what it says, its numbers are right."""

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from cli import models
from llava import LlavaForConditionalGeneration as Llava

ROOT = Path(__file__).parent.parent.parent
README = (ROOT / "README.md").read_text()
CORE = ["clip.py", "tokenizer.py", "llama.py", "llava.py", "generate.py", "load_weights.py"]
SESSIONS = re.findall(r"^\$ (python .*)\n((?:(?!```|\$ ).*\n)*)", README, re.M)  # a command, and what is shown below it
EDITS = re.findall(r"^\| \[(\w+\.py)\]\(.*?\): ([^|]*) \| `(.*?)` \| `(.*?)` \| `(.*?)` \| (.*) \|$", README, re.M)


def run(command: str, folder: Path) -> subprocess.CompletedProcess:
    command = command.replace("python", shlex.quote(sys.executable), 1)
    return subprocess.run(["bash", "-c", command], cwd=folder, capture_output=True, text=True, timeout=120)


@pytest.mark.quick
def test_the_readme_is_short():
    assert len(README.splitlines()) <= 170


@pytest.mark.quick
def test_ci_runs_the_readmes_test_command():
    assert (ROOT / ".ci" / "run").read_text().splitlines()[-1] in README.splitlines()


@pytest.mark.quick
def test_the_line_count_of_the_core_is_right():
    lines = sum(len((ROOT / name).read_text().splitlines()) for name in CORE)
    said = re.findall(r"model is six files, ([\d,]+) lines in total", README)
    assert len(said) == 2 and all(abs(lines - int(number.replace(",", ""))) <= 20 for number in said)


@pytest.mark.quick
@pytest.mark.parametrize("page", sorted(ROOT.glob("*.md")) + sorted(ROOT.glob("[a-z]*/README.md")), ids=str)
def test_links_and_pictures_exist(page):
    text = page.read_text()
    targets = re.findall(r"\]\((?!http)([^)#]+)", text) + re.findall(r'src="([^"]+)"', text)
    missing = [target for target in targets if not (page.parent / target).exists()]
    assert not missing


@pytest.mark.quick
def test_the_map_names_every_folder_and_command():
    folders = {path.name for path in ROOT.iterdir() if path.is_dir() and list(path.glob("*.py"))}
    named = set(re.findall(r"\]\((\w+(?:\.py)?)(?:/README.md)?\)", README))
    assert folders | {path.name for path in ROOT.glob("*.py")} <= named


@pytest.mark.parametrize(("command", "shown"), SESSIONS, ids=[command for command, _ in SESSIONS])
def test_the_readme_shows_what_its_commands_really_print(command, shown):
    assert run(command, ROOT).stdout.strip() == shown.strip()


def test_the_readmes_python_code_runs(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    for code in re.findall(r"```python\n(.*?)```", README, re.DOTALL):
        exec(code, {})
    assert "there is a rocket. The background is black." in capsys.readouterr().out


@pytest.mark.quick
def test_the_table_of_checkpoints_is_that_of_the_command():
    rows = re.findall(r"^\| [^|]+ \| ([^|]+/[^|]+) \| ([\d., ]+) \| ([\d., ]+) \|$", README, re.M)
    told = [each for row in rows for each in zip(*(part.split(", ") for part in row), strict=True)]
    expected = []
    for name, *_ in models.MODELS:
        sizes = [models.memory(Llava, models.config_of(name), quantize=how) / 1e9 for how in (None, "int4")]
        expected.append((name, *(f"{size:.1f}" for size in sizes)))
    assert sorted(told) == sorted(expected)


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """The repository once more, to be edited."""
    folder = tmp_path_factory.mktemp("copy") / "llava"
    skip = shutil.ignore_patterns(".git", ".venv", "runs", "notebooks", "sprites", "stages", "__pycache__", ".*_cache")
    shutil.copytree(ROOT, folder, ignore=skip)
    return folder


@pytest.mark.parametrize("edit", EDITS, ids=[what for _, what, *_ in EDITS])
def test_an_edit_breaks_the_test_it_names_and_changes_the_answer(copy, edit):
    name, _, old, new, test, says = edit
    original = (copy / name).read_text()
    assert original.count(old) == 1
    (copy / name).write_text(original.replace(old, new))
    try:
        failed = run(f"python -m pytest -q -p no:cacheprovider -p no:hypothesispytest {test}", copy)
        assert failed.returncode == 1, failed.stdout
        answer = run("python llava.py --kernels torch --image images/rocket.jpg --max-new-tokens 30", copy)
        assert answer.stdout.strip() == says, answer.stderr
    finally:
        (copy / name).write_text(original)


@pytest.mark.quick
def test_the_readme_has_sessions_and_edits():
    assert len(SESSIONS) >= 3 and len(EDITS) == 4
