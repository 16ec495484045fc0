"""The notebooks: each runs from top to bottom, prints what is stored of it, and can be solved."""

import ast
import base64
import copy
import io
import json
import math
import re
from contextlib import nullcontext
from pathlib import Path

import nbformat
import numpy as np
import pytest
from PIL import Image

from forked_kernels import forked_kernels
from notebooks.execute import execute, has_tag, revealed_file, text_of

ROOT = Path(__file__).parent.parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
OURS = {file.stem for file in ROOT.glob("*.py")} | {file.parent.name for file in ROOT.glob("[a-z]*/*.py")}


def read(path: Path) -> nbformat.NotebookNode:
    return nbformat.read(path, as_version=4)


def pictures(notebook: nbformat.NotebookNode) -> list[Image.Image]:
    found = [out.data["image/png"] for cell in notebook.cells for out in cell.get("outputs", ()) if "data" in out
             and "image/png" in out.data]  # fmt: skip
    return [Image.open(io.BytesIO(base64.b64decode(data))) for data in found]


def check_outputs(notebook: nbformat.NotebookNode, few: bool = False) -> None:
    """What a reader sees: no errors, no warnings, figures with content, though not `few` of them if some are hidden."""
    outputs = [out for cell in notebook.cells for out in cell.get("outputs", ())]
    assert not [out for out in outputs if out.output_type == "error" or out.get("name") == "stderr"]
    drawn = pictures(notebook)
    assert drawn or few
    for picture in drawn:  # more than a frame and its numbers
        assert np.asarray(picture.convert("L")).std() > 10 and len(picture.convert("RGB").getcolors(2**24)) > 50


FIRST_CELL = '''\
import pathlib
import subprocess
import sys

if not pathlib.Path("walk.py").exists():  # on Colab: fetch the repository that this notebook comes from
    subprocess.run(["git", "clone", input("address of the repository: "), "llava"], check=True)
    sys.path.insert(0, "llava/notebooks")
import walk'''
NUMBER = re.compile(r"[-+]?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?:e[-+]?\d+)?")


def difference(stored: str, fresh: str, numbers: bool = True) -> str | None:
    """The first word in which two texts differ, or the first number that differs by more than 2 %; None if none does.

    Spaces do not count. With numbers=False all numbers are ignored and only the words are compared.
    """
    words, others = (NUMBER.sub(" # " if numbers else " ", text).split() for text in (stored, fresh))
    for i in range(max(len(words), len(others))):
        if words[i : i + 1] != others[i : i + 1]:
            return f"stored {' '.join(words[i : i + 5])!r}, now {' '.join(others[i : i + 5])!r}"
    values = zip(*(NUMBER.findall(text) for text in (stored, fresh)), strict=True) if numbers else ()
    for value, other in values:
        if not math.isclose(*(float(number.replace(",", "")) for number in (value, other)), rel_tol=0.02):
            return f"stored {value}, now {other}"
    return None


STORED = "a layer's keys: (1, 4, 8, 64)\nscores 1,344 and -0.0461, in float16 at most 8.3e-07, found: ▁cat"


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("▁cat", "▁hat"),
        ("keys", "key"),
        (", found", ""),
        ("▁cat", "▁cat and more"),
        ("64", "67.2"),
        ("1,344", "1,411"),
        ("-0.0461", "0.0461"),
        ("-0.0461", "-0.0484"),
        ("float16", "float32"),
        ("8.3e-07", "8.7e-07"),
        ("8.3e-07", "8.3e-06"),
        ("(1, 4,", "(1,"),
    ],
)
def test_another_word_or_a_number_5_percent_off_is_a_difference(old, new):
    assert difference(STORED, STORED) is None
    assert difference(STORED, STORED.replace(old, new))
    assert difference(STORED.replace(old, new), STORED)


def test_spaces_and_small_deviations_are_no_difference():
    fresh = STORED.replace("\n", "   \n ").replace("1,344", "1360").replace("0.0461", "0.0469")
    assert difference(STORED, fresh) is None


def test_on_a_machine_of_its_own_only_words_count():
    stored = "with cache: 1.8  2.0 ms, in float32\n"
    assert difference(stored, "with cache: 12  0.5 ms, in float32\n", numbers=False) is None
    assert difference(stored, "with cache: 1.8  2.0 s, in float32\n", numbers=False)


def test_the_readme_lists_them_all():
    listed = re.findall(r"\]\((\w*\.ipynb)\)", (ROOT / "notebooks" / "README.md").read_text())
    assert listed == [path.name for path in NOTEBOOKS] and len(listed) >= 10


def puzzles(notebook: nbformat.NotebookNode) -> list[tuple[str, nbformat.NotebookNode]]:
    """The name of each puzzle's function, and the cell after it, which checks it."""
    found = []
    for cell, after in zip(notebook.cells, notebook.cells[1:], strict=False):
        if has_tag(cell, "puzzle"):
            found.append((ast.parse(cell.source).body[-1].name, after))
    return found


def solutions(path: Path) -> dict[str, str]:
    """The source of each function in the file of solutions, with the imports of the file."""
    source = (path.parent / "solutions" / f"{path.stem}.py").read_text()
    body = ast.parse(source).body
    imports = [ast.get_source_segment(source, node) for node in body if isinstance(node, ast.Import | ast.ImportFrom)]
    functions = {node.name: ast.get_source_segment(source, node) for node in body if isinstance(node, ast.FunctionDef)}
    return {name: "\n".join([*imports, text]) for name, text in functions.items()}


@pytest.fixture(scope="module")
def fork():
    with forked_kernels() as fork:
        yield fork


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_from_top_to_bottom_and_prints_what_is_stored(path, monkeypatch, fork):
    """Then, in the same process, its puzzles are solved by their solutions. The first runs in a kernel of Jupyter's."""
    monkeypatch.setenv("SHORT_NOTEBOOKS", "1")
    stored, solved = read(path), solutions(path)
    revealed = json.loads(revealed_file(path).read_text("utf-8"))
    asked = puzzles(stored)
    assert [name for name, _ in asked] == list(solved)
    longer = copy.deepcopy(stored)
    for name, checks in asked:
        longer.cells += [nbformat.v4.new_code_cell(solved[name]), nbformat.v4.new_code_cell(checks.source)]
    with nullcontext() if path == NOTEBOOKS[0] else fork:
        notebook = execute(longer)
    notebook.cells, answers = notebook.cells[: len(stored.cells)], notebook.cells[len(stored.cells) :]
    check_outputs(notebook)
    for cell, fresh in zip(stored.cells, notebook.cells, strict=True):
        if not has_tag(cell, "trained"):  # after a training that is shorter here
            expected = revealed[cell.id] if has_tag(cell, "reveal") else text_of(cell)
            assert not difference(expected, text_of(fresh), numbers=not has_tag(cell, "machine")), cell.id
    assert [text_of(cell).strip() for cell in answers[1::2]] == ["solved"] * len(asked)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_kept_as_a_reader_wants_it(path):
    """With its outputs, small, in the agreed form, and importing the code that it is about."""
    notebook, text = read(path), path.read_text()
    assert len(text) < 1_000_000 and str(ROOT) not in text
    check_outputs(notebook, few=True)
    assert re.match(rf"# {int(path.name[:2])}\. ", notebook.cells[0].source)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(cell.outputs or cell.execution_count for cell in code)
    assert all(len(cell.source.splitlines()) <= 25 for cell in code)
    own = [ast.parse(cell.source) for cell in code if not has_tag(cell, "puzzle")]
    nodes = [node for tree in own for node in ast.walk(tree)]
    assert code[0].source == FIRST_CELL
    assert OURS & {node.module.partition(".")[0] for node in nodes if isinstance(node, ast.ImportFrom)}
    asked = puzzles(notebook)
    assert 3 <= len(asked) <= 6
    assert all("NotImplementedError" in cell.source for cell in code if has_tag(cell, "puzzle"))
    assert all(text_of(checks).strip() == "not solved yet" for _, checks in asked)
    assert f"](solutions/{path.stem}.py)" in text


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_no_output_spoils_a_prediction(path):
    """The code after a prediction asks for a guess, or its output is not stored."""
    cells = read(path).cells
    asked = [i for i, cell in enumerate(cells) if cell.cell_type == "markdown" and "**Predict.**" in cell.source]
    assert len(asked) >= 3
    for i in asked:
        after = next(cell for cell in cells[i + 1 :] if cell.cell_type == "code")
        assert has_tag(after, "reveal") or "walk.predict(None" in after.source, after.source
    for cell in cells:
        if has_tag(cell, "reveal"):
            assert not cell.outputs
        elif cell.cell_type == "code" and "walk.predict(" in cell.source:
            assert text_of(cell).strip() == "Write your guess in place of None, and run this cell again."
