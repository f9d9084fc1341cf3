"""The pictures of the README, from real runs: python benchmarks/pictures.py. It takes a minute.

cube.png is what `jn.inspect.plot_cube` draws from layout and over; small_batches.png is the picture of notebook 5.
"""

import base64
import tempfile
from pathlib import Path

import nbclient
import nbformat

import jaxnorm as jn

ROOT = Path(__file__).parents[1]
OUT = ROOT / "benchmarks" / "results" / "pictures"


def pictures_of(notebook: str) -> list[bytes]:
    """What a notebook shows, as PNG, in order."""
    read = nbformat.read(ROOT / "notebooks" / notebook, as_version=4)
    with tempfile.TemporaryDirectory() as folder:
        nbclient.NotebookClient(read, timeout=600, resources={"metadata": {"path": folder}}).execute()
    shown = (output.get("data", {}).get("image/png") for cell in read.cells for output in cell.get("outputs", []))
    return [base64.b64decode(png) for png in shown if png]


def main() -> None:
    OUT.mkdir(parents=True, exist_ok=True)
    jn.inspect.plot_cube(["batch", "layer", "instance", "group"]).savefig(OUT / "cube.png", dpi=100)
    (OUT / "small_batches.png").write_bytes(pictures_of("05_small_batches.ipynb")[-1])


if __name__ == "__main__":
    main()
