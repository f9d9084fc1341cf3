"""benchmarks/fusions.py counts what compiled programs write and read."""

import importlib.util
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "fusions.py"
spec = importlib.util.spec_from_file_location("fusions", SCRIPT)
assert spec is not None
assert spec.loader is not None
fusions = importlib.util.module_from_spec(spec)
spec.loader.exec_module(fusions)
X = jax.ShapeDtypeStruct((64, 128), jnp.float32)


@pytest.mark.parametrize(
    ("function", "written", "read"),
    [
        (lambda x: jnp.sin(x) + 1, 1, 1),
        (lambda x: x + jnp.sort(x, 0), 2, 3),  # the sort is written out, and read beside x
        (lambda x: jnp.sum(x * x), 0, 1),
    ],
    ids=["a loop", "an array between", "a sum"],
)
def test_streams(function, written, read):
    loops = fusions.loops(jax.jit(function).lower(X).compile().as_text())
    size = 64 * 128 * 4
    assert fusions.size("f32[64,128]{1,0}") == size
    assert sum(loop["written"] for loop in loops) / size == pytest.approx(written, abs=0.02)
    assert sum(loop["read"] for loop in loops) / size == pytest.approx(read, abs=0.02)


def test_sizes_of_types():
    assert fusions.size("(bf16[2,3]{1,0}, f32[], pred[7])") == 2 * 3 * 2 + 4 + 7
