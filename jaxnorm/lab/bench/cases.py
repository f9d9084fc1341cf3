"""The shapes of the benchmark, and one of them measured."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxnorm.lab.bench import peers, timing

# Channels last, 2**22 elements, which are 16 MB of float32; (256, 14, 14, 80) has some fewer than 2**22. What comes
# first grows with --mb.
SHAPES = {
    "batch": ((64, 32, 32, 64), (256, 14, 14, 80), (4096, 1024)),
    "layer": ((8192, 512), (16, 512, 512), (4096, 1024)),
    "rms": ((8192, 512), (16, 512, 512), (4096, 1024)),
    "instance": ((16, 64, 64, 64), (16, 32, 32, 256)),
    "group": ((16, 32, 32, 256), (16, 64, 64, 64)),
}
MB = 16
ACCELERATOR_CALLS = 10  # at once: one alone is shorter than starting it and waiting for it


def scaled(shape: tuple[int, ...], mb: float) -> tuple[int, ...]:
    return (max(1, round(shape[0] * mb / MB)), *shape[1:])


def make_arrays(shape: tuple[int, ...], dtype: str, mean: float = 0.5) -> tuple[jax.Array, ...]:
    """x, scale, bias and g: N(mean, 1), near 1, near 0, N(0, 1)."""
    rng = np.random.default_rng(0)

    def normal(shape: tuple[int, ...], mean: float, std: float, dtype: str = "float32") -> jax.Array:
        return jnp.asarray(mean + std * rng.standard_normal(shape, np.float32), dtype)

    c = shape[-1:]
    return normal(shape, mean, 1, dtype), normal(c, 1, 0.1), normal(c, 0, 0.1), normal(shape, 0, 1, dtype)


def measure(
    norm: str, dtype: str, shape: tuple[int, ...], names: tuple[str, ...], runs: int, mean: float = 0.5
) -> list[dict[str, Any]]:
    """A row for each framework and way, and one for the copy."""
    arrays = make_arrays(shape, dtype, mean)
    timed: dict[tuple[str, str], timing.Timed] = {("copy", "copy"): timing.copy(arrays[0])}
    for name in names:
        made = peers.calls(name, norm, arrays)
        timed |= {(name, way): (getattr(made, way), made.wait) for way in timing.WAYS}
    times = timing.interleaved(timed, runs, 1 if jax.default_backend() == "cpu" else ACCELERATOR_CALLS)
    copied = times["copy", "copy"].minimum
    rows = []
    for (name, way), of in times.items():
        row = {"norm": norm, "dtype": dtype, "shape": shape, "peer": name, "way": way}
        row |= {"min_ms": 1e3 * of.minimum, "median_ms": 1e3 * of.median}
        if name == "copy":
            row["mb"] = arrays[0].nbytes / 1e6
            row["gb_per_s"] = timing.COPY_STREAMS * arrays[0].nbytes / of.minimum / 1e9
        else:
            row["times_limit"] = timing.times_limit(of.minimum, copied, norm, way)
        rows.append(row)
    return rows
