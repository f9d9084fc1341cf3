"""How long calls take: in turn in one process, after warming up, minimum and median.

The limit of a norm is memory traffic: the bytes that it cannot but read and write, at the speed of a copy. A norm reads
x and writes y: two streams of the size of x. Its backward pass reads x again and g, and writes x's gradient: five
together. The reduction of batch norm runs over the whole of x before the first y is known, and that of its backward
pass over x and g before the first gradient: x is read twice forward, x and g twice backward, 3 and 8.
"""

import math
import random
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

WAYS = ("forward", "backward")  # "backward" is forward and backward everywhere
STREAMS = {norm: {"forward": 2, "backward": 5} for norm in ("layer", "rms", "instance", "group")}
STREAMS["batch"] = {"forward": 3, "backward": 8}
COPY_STREAMS = 2
WARM_UP = 2  # rounds; the first compiles

Timed = tuple[Callable[[], Any], Callable[[Any], Any]]  # what is called, and what waits for its result


class Time(NamedTuple):
    """Seconds a call."""

    minimum: float
    median: float


def interleaved(timed: Mapping[Any, Timed], runs: int, calls: int = 1) -> dict[Any, Time]:
    """Times each `runs` times, in rounds that have each once: what else the machine does then meets all alike.

    The order changes from round to round, as a call finds in the caches, and in threads that still spin, what the one
    before has left. `calls` are made one after another and waited for together, which hides what it costs to start
    one, as a program hides it that has more than one operation.
    """
    order = list(timed)
    shuffle = random.Random(0).shuffle
    seconds: dict[Any, list[float]] = {key: [] for key in timed}
    for run in range(WARM_UP + runs):
        shuffle(order)
        for key in order:
            call, wait = timed[key]
            start = time.perf_counter()
            for _ in range(calls - 1):
                call()
            wait(call())
            took = time.perf_counter() - start
            if run >= WARM_UP:
                seconds[key].append(took / calls)
    return {key: Time(min(of), statistics.median(of)) for key, of in seconds.items()}


def copy(x: jax.Array) -> Timed:
    """A jitted copy of x: one stream read and one written."""
    copied = jax.jit(jnp.copy)
    return lambda: copied(x), jax.block_until_ready


def times_limit(seconds: float, copy_seconds: float, norm: str, way: str) -> float:
    """How many times the least time it is: streams times the bytes of x, at the bandwidth of a copy of x."""
    return seconds / (STREAMS[norm][way] / COPY_STREAMS * copy_seconds)


def geometric_mean(values: Iterable[float]) -> float:
    logs = [math.log(value) for value in values]
    return math.exp(math.fsum(logs) / len(logs))
