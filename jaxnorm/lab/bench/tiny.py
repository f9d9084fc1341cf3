"""Inputs so small that what counts is the call, not the arithmetic: a batch of 32 rows of 64, ours and flax.linen's."""

from collections.abc import Callable
from typing import Any

from jaxnorm.lab.bench import peers, timing
from jaxnorm.lab.bench.cases import make_arrays

PEERS = ("flax.linen", "jaxnorm")
SHAPE = (32, 64)
SHAPES = {"instance": (2, 4, 4, 64)}  # as many numbers, with something to average over
CALLS = {"jitted": 50, "eager": 2}  # a timed sample, so that it is long against the clock


def measure(norm: str, dtype: str, runs: int, tick: Callable[[], None]) -> list[dict[str, Any]]:
    """Rows of a norm: by peer and way, eager and jitted. An eager call is timed as a user waits for it."""
    arrays = make_arrays(SHAPES.get(norm, SHAPE), dtype)
    rows = []
    for mode, calls in CALLS.items():
        timed: dict[tuple[str, str], timing.Timed] = {}
        for peer in PEERS:
            made = peers.calls(peer, norm, arrays, jit=mode == "jitted")
            timed |= {(peer, way): (getattr(made, way), made.wait) for way in timing.WAYS}
        for (peer, way), of in timing.interleaved(timed, runs, calls).items():
            shown = {"min_us": 1e6 * of.minimum, "median_us": 1e6 * of.median}
            rows.append({"norm": norm, "dtype": dtype, "mode": mode, "peer": peer, "way": way} | shown)
        tick()
    return rows
