"""What a norm costs before the first step: tracing and compiling the training step of a 50-layer ResNet.

He et al. 2016, "Deep Residual Learning for Image Recognition", table 1: 53 norms. The pictures are small, so that the
arrays are, too: those of large ones get more loops on CPU (jaxnorm/cpu.py), which take longer to compile.
"""

import contextlib
import gc
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.experimental.compilation_cache import compilation_cache

from jaxnorm.linen import BatchNorm

NORMS = {"flax.linen": nn.BatchNorm, "jaxnorm": BatchNorm}
STAGES = (3, 4, 6, 3)  # blocks of three convolutions: with the first convolution and the last layer, 50 layers
RUNS = 5


class Bottleneck(nn.Module):
    """1 x 1, 3 x 3 and 1 x 1 convolutions beside a shortcut."""

    width: int
    strides: int
    norm: Callable[..., Any]

    @nn.compact
    def __call__(self, x):
        conv = partial(nn.Conv, use_bias=False)
        y = nn.relu(self.norm()(conv(self.width, (1, 1))(x)))
        y = nn.relu(self.norm()(conv(self.width, (3, 3), self.strides)(y)))
        y = self.norm()(conv(4 * self.width, (1, 1))(y))
        if x.shape != y.shape:
            x = self.norm()(conv(4 * self.width, (1, 1), self.strides)(x))
        return nn.relu(x + y)


class ResNet(nn.Module):
    norm: Callable[..., Any]
    stages: Sequence[int] = STAGES

    @nn.compact
    def __call__(self, x):
        norm = partial(self.norm, use_running_average=False)
        x = nn.relu(norm()(nn.Conv(64, (7, 7), 2, use_bias=False)(x)))
        x = nn.max_pool(x, (3, 3), (2, 2), "SAME")
        for stage, blocks in enumerate(self.stages):
            for block in range(blocks):
                x = Bottleneck(64 * 2**stage, 2 if stage and not block else 1, norm)(x)
        return nn.Dense(1000)(x.mean((1, 2)))


def step(model: ResNet, variables: dict[str, Any], x: jax.Array, labels: jax.Array) -> tuple[jax.Array, Any, Any]:
    """The loss, its gradients, and the running statistics."""

    def loss(params):
        scores, new = model.apply({**variables, "params": params}, x, mutable=["batch_stats"])
        return -(jax.nn.log_softmax(scores) * jax.nn.one_hot(labels, 1000)).sum(-1).mean(), new

    (value, new), gradients = jax.value_and_grad(loss, has_aux=True)(variables["params"])
    return value, gradients, new


@contextlib.contextmanager
def no_cache() -> Iterator[None]:
    """Without JAX's cache of compiled programs on disk. Whether it is used is settled once: hence the resets."""
    # JAX makes this attribute at run time and refuses config.read of it
    before = jax.config.jax_enable_compilation_cache  # pyright: ignore[reportAttributeAccessIssue]
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", before)
        compilation_cache.reset_cache()


@contextlib.contextmanager
def no_garbage() -> Iterator[None]:
    """Without garbage collection, as in timeit: how long that takes is a matter of what else was imported."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def measure(stages: Sequence[int] = STAGES, tick: Callable[[], None] = lambda: None) -> list[dict[str, Any]]:
    """A row for each norm: seconds to trace and lower, and seconds to compile, of runs in turn."""
    x = jax.ShapeDtypeStruct((2, 32, 32, 3), jnp.float32)
    labels = jax.ShapeDtypeStruct((2,), jnp.int32)
    seconds: dict[str, dict[str, list[float]]] = {name: {"trace": [], "compile": []} for name in NORMS}
    with no_cache():
        for run in range(RUNS):
            for name in sorted(NORMS, reverse=run % 2 == 1):
                model = ResNet(NORMS[name], stages)
                variables = jax.eval_shape(model.init, jax.random.key(0), x)
                jax.clear_caches()
                with no_garbage():
                    start = time.perf_counter()
                    lowered = jax.jit(partial(step, model)).trace(variables, x, labels).lower()
                    traced = time.perf_counter()
                with ThreadPoolExecutor(1) as pool:  # Ctrl-C inside XLA's compiler ends in a crash: it waits out here
                    pool.submit(lowered.compile).result()
                seconds[name]["trace"].append(traced - start)
                seconds[name]["compile"].append(time.perf_counter() - traced)
                tick()
    rows = []
    for name, of in seconds.items():
        row: dict[str, Any] = {"peer": name}
        for part, values in of.items():
            row |= {f"{part}_min_s": min(values), f"{part}_median_s": statistics.median(values)}
        rows.append(row)
    return rows
