"""The notebooks run from top to bottom, on a CPU, as they are; each claims something, and shows it.

They are executed in kernels of their own, so under JAX's default settings and not under those of tests/conftest.py.
"""

import ast
import os
from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")
pytest.importorskip("ipykernel")

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
MISSING = "BadOption"  # what jaxnorm.lab raises, in one line that says how to get the data


def code(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


@pytest.fixture(params=NOTEBOOKS, ids=lambda path: path.stem)
def notebook(request):
    return nbformat.read(request.param, as_version=4)


def test_they_are_numbered():
    numbers = [int(path.name[:2]) for path in NOTEBOOKS]
    assert numbers == list(range(1, len(NOTEBOOKS) + 1))


def test_it_is_stored_without_outputs_and_is_short(notebook):
    nbformat.validate(notebook)
    cells = code(notebook)
    assert len(cells) <= 25
    assert all(not cell.outputs and cell.execution_count is None for cell in cells)
    assert max(len(cell.source.splitlines()) for cell in cells) <= 30
    assert all(not cell.metadata for cell in notebook.cells)
    assert set(notebook.metadata) <= {"kernelspec", "language_info"}
    assert all(path not in cell.source for cell in notebook.cells for path in ("/home/", "/work/", "/tmp/"))


def test_it_begins_with_a_title_and_ends_with_advice(notebook):
    first, last = notebook.cells[0], notebook.cells[-1]
    assert (first.cell_type, last.cell_type) == ("markdown", "markdown")
    assert first.source.startswith("# ")
    assert "**What to choose.**" in last.source


def test_it_imports_what_is_public(notebook):
    names = set()
    for node in ast.walk(ast.parse("\n".join(cell.source for cell in code(notebook)))):
        names |= {alias.name for alias in node.names} if isinstance(node, ast.Import) else set()
        names |= {f"{node.module}.{alias.name}" for alias in node.names} if isinstance(node, ast.ImportFrom) else set()
    assert not [name for name in names if any(part.startswith("_") for part in name.split("."))]


def test_it_runs_and_shows_a_picture(notebook, request, tmp_path, monkeypatch):
    assert any(isinstance(node, ast.Assert) for cell in code(notebook) for node in ast.walk(ast.parse(cell.source)))
    monkeypatch.delenv("XLA_FLAGS", raising=False)  # conftest's: quick to compile, slow to run
    monkeypatch.setenv("JAX_PLATFORMS", os.environ.get("JAX_PLATFORMS", "cpu"))
    cache = ROOT / ".jax_cache" / request.node.callspec.id  # its own: JAX writes a cache without a lock
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(cache))
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))  # the folder is empty
    monkeypatch.setenv("MPLBACKEND", "module://matplotlib_inline.backend_inline")
    client = nbclient.NotebookClient(
        notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    )
    try:
        client.execute()
    except nbclient.exceptions.CellExecutionError as error:
        if error.ename == MISSING:
            pytest.skip(error.evalue)
        raise
    outputs = [output for cell in code(notebook) for output in cell.outputs]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert not [output.text for output in outputs if output.output_type == "stream" and output.name == "stderr"]
