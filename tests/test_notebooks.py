"""The notebooks: each runs from top to bottom, draws something in every picture, and has no code of ours."""

import ast
import base64
import io
import re
from pathlib import Path

import nbformat
import numpy as np
import pytest
from PIL import Image

from notebooks.execute import execute

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
OURS = {file.stem for file in ROOT.glob("*.py")} | {"kernels"}


def read(path: Path) -> nbformat.NotebookNode:
    return nbformat.read(path, as_version=4)


def is_puzzle(cell: nbformat.NotebookNode) -> bool:
    return "puzzle" in cell.metadata.get("tags", ())


def pictures(notebook: nbformat.NotebookNode) -> list[Image.Image]:
    found = [out.data["image/png"] for cell in notebook.cells for out in cell.get("outputs", ()) if "data" in out
             and "image/png" in out.data]  # fmt: skip
    return [Image.open(io.BytesIO(base64.b64decode(data))) for data in found]


def check_outputs(notebook: nbformat.NotebookNode) -> None:
    """What a reader sees: no errors, no complaints, pictures with something in them."""
    outputs = [out for cell in notebook.cells for out in cell.get("outputs", ())]
    assert not [out for out in outputs if out.output_type == "error" or out.get("name") == "stderr"]
    drawn = pictures(notebook)
    assert drawn
    for picture in drawn:  # more than a frame and its numbers
        assert np.asarray(picture.convert("L")).std() > 10 and len(picture.convert("RGB").getcolors(2**24)) > 50


def test_the_readme_lists_them_all():
    listed = re.findall(r"\]\(notebooks/(.*?\.ipynb)\)", (ROOT / "README.md").read_text())
    assert listed == [path.name for path in NOTEBOOKS] and len(listed) >= 10


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_from_top_to_bottom(path):
    notebook = execute(path)
    check_outputs(notebook)
    assert len(pictures(notebook)) == len(pictures(read(path)))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_kept_as_a_reader_wants_it(path):
    """With its outputs, small, in the agreed form, and with none of our code written once more."""
    notebook, text = read(path), path.read_text()
    assert len(text) < 1_000_000 and str(ROOT) not in text
    check_outputs(notebook)
    assert re.match(rf"# {int(path.name[:2])}\. ", notebook.cells[0].source)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(cell.outputs or cell.execution_count for cell in code)
    own = [ast.parse(cell.source) for cell in code if not is_puzzle(cell)]
    nodes = [node for tree in own for node in ast.walk(tree)]
    assert not [node for node in nodes if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Lambda)]
    assert OURS & {node.module.partition(".")[0] for node in nodes if isinstance(node, ast.ImportFrom)}
    puzzles = [cell for cell in code if is_puzzle(cell)]
    assert 2 <= len(puzzles) <= 3 and all("NotImplementedError" in cell.source for cell in puzzles)
    said = "".join(out.text for cell in code for out in cell.outputs if out.output_type == "stream")
    assert said.count("not solved yet") == len(puzzles)
