"""Run notebooks from top to bottom and store their text and figures: python notebooks/execute.py [FILE ...]

What a cell tagged `reveal` prints would answer the prediction before it. It is not stored in the notebook. Its text
goes to revealed/NAME.json, {id of the cell: text}, where only the tests read it.
"""

import base64
import io
import json
import sys
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from PIL import Image

FOLDER = Path(__file__).parent


def execute(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """The notebook with new outputs. Raises nbclient's CellExecutionError where a cell fails."""
    at = {"metadata": {"path": FOLDER}}
    options = {"kernel_name": "python3", "resources": at, "record_timing": False}
    NotebookClient(notebook, timeout=600, coalesce_streams=True, **options).execute()
    return notebook


def has_tag(cell: nbformat.NotebookNode, tag: str) -> bool:
    return tag in cell.metadata.get("tags", ())


def text_of(cell: nbformat.NotebookNode) -> str:
    """What a cell printed, then its other outputs as text."""
    outputs = cell.get("outputs", ())
    printed = "".join(out.text for out in outputs if out.output_type == "stream")
    data = [out.data for out in outputs if "data" in out]
    return "\n".join([printed, *(each.get("text/markdown", each.get("text/plain", "")) for each in data)])


def revealed_file(path: Path) -> Path:
    return path.parent / "revealed" / f"{path.stem}.json"


def hide(notebook: nbformat.NotebookNode) -> dict[str, str]:
    """Remove the outputs of the cells tagged `reveal`; returns their text by the cell's id."""
    cells = [cell for cell in notebook.cells if has_tag(cell, "reveal")]
    texts = {cell.id: text_of(cell) for cell in cells}
    for cell in cells:
        cell.outputs = []
    return texts


def shrink(notebook: nbformat.NotebookNode) -> None:
    """Reduce figures to a palette of 256 colours: a third of the bytes, without a visible difference."""
    for cell in notebook.cells:
        for output in cell.get("outputs", ()):
            if "image/png" in output.get("data", ()):
                picture = Image.open(io.BytesIO(base64.b64decode(output.data["image/png"]))).convert("RGB")
                picture.quantize(256, dither=Image.Dither.NONE).save(file := io.BytesIO(), "PNG", optimize=True)
                output.data["image/png"] = base64.b64encode(file.getvalue()).decode()


def main(paths: list[str]) -> None:
    for path in map(Path, paths or sorted(FOLDER.glob("*.ipynb"))):
        start = time.monotonic()
        notebook = execute(nbformat.read(path, as_version=4))
        revealed_file(path).parent.mkdir(exist_ok=True)
        revealed_file(path).write_text(json.dumps(hide(notebook), indent=1, ensure_ascii=False) + "\n", "utf-8")
        shrink(notebook)
        nbformat.write(notebook, path)
        print(f"{path.name}: {time.monotonic() - start:.0f} s, {path.stat().st_size / 1000:.0f} kB", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
