"""The pictures of the README, from real runs: python benchmarks/pictures.py. It takes two minutes.

cube.png is what `jn.inspect.plot_cube` draws from layout and over; the others are shown by notebooks.
"""

import base64
import tempfile
from pathlib import Path

import nbclient
import nbformat

import jaxnorm as jn

ROOT = Path(__file__).parents[1]
OUT = ROOT / "benchmarks" / "results" / "pictures"
# what it is called here, the notebook, which of its pictures
SHOWN = [
    ("small_batches", "05_small_batches", -1),
    ("padding", "06_sequences", -1),
    ("light", "07_style", 2),
    ("columns", "08_what_layer_norm_loses", 1),
]


def pictures_of(notebook: str) -> list[bytes]:
    """What a notebook shows, as PNG, in order."""
    read = nbformat.read(ROOT / "notebooks" / f"{notebook}.ipynb", as_version=4)
    with tempfile.TemporaryDirectory() as folder:
        nbclient.NotebookClient(read, timeout=600, resources={"metadata": {"path": folder}}).execute()
    shown = (output.get("data", {}).get("image/png") for cell in read.cells for output in cell.get("outputs", []))
    return [base64.b64decode(png) for png in shown if png]


def main() -> None:
    OUT.mkdir(parents=True, exist_ok=True)
    jn.inspect.plot_cube(["batch", "layer", "instance", "group"]).savefig(OUT / "cube.png", dpi=100)
    for name, notebook, which in SHOWN:
        (OUT / f"{name}.png").write_bytes(pictures_of(notebook)[which])


if __name__ == "__main__":
    main()
