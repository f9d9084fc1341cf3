"""The one table of all norms in the tests. Every rule in test_norms.py runs over every row of it.

A row is the three lists of names, a call of the public function that is that norm, and the shape of a sample. What the
row should give is said by the names alone, through reference.py, so a row cannot agree with itself by mistake.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import reference

import jaxnorm as jn


@dataclasses.dataclass(frozen=True)
class Norm:
    """One row: `call(x, scale=, bias=, mask=) -> y`, or with `state` `call(x, running, ...) -> (y, running)`."""

    name: str
    layout: str
    over: str
    features: str
    shape: tuple[int, ...]
    call: Callable
    epsilon: float
    center: bool = True
    sizes: Mapping[str, int] = dataclasses.field(default_factory=dict)
    state: Mapping[str, int] | None = None  # sizes of the running statistics, for the norms that have them

    def __call__(self, x, scale=None, bias=None, **kw):
        """y, through the norm's own function."""
        if self.state is None:
            return self.call(x, scale=scale, bias=bias, **kw)
        return self.step(jn.running_stats(" ".join(self.state), **self.state), x, scale, bias, **kw)[1]

    def step(self, running, x, scale=None, bias=None, **kw):
        """The new running statistics first, then y: the order of a scan body."""
        y, running = self.call(x, running, scale=scale, bias=bias, **kw)
        return running, y

    def verb(self, x, scale=None, bias=None, **kw):
        """(y, moments), through `standardize` and the names alone."""
        names = {"features": self.features, "epsilon": self.epsilon, "center": self.center, "sizes": self.sizes}
        return jn.standardize(x, self.layout, self.over, scale=scale, bias=bias, **names, **kw)

    def moments(self, x, **kw):
        return jn.moments(x, self.layout, self.over, center=self.center, sizes=self.sizes, **kw)

    def reference(self, x, scale=None, bias=None, **kw):
        """(y, statistics) in float64."""
        names: dict[str, Any] = {"features": self.features, "epsilon": self.epsilon, "center": self.center}
        return reference.standardize(x, self.layout, self.over, scale=scale, bias=bias, sizes=self.sizes, **names, **kw)

    def features_shape(self):
        """The lengths along `features`, a composed dimension whole: the shape of scale and bias."""
        z, names = reference.open_up(np.empty(self.shape), self.layout, self.sizes)
        lengths = tuple(z.shape[names.index(name)] for name in reference.select(names, self.features))
        return (math.prod(lengths),) if self.features.startswith("(") else lengths

    def sample(self, seed=0, dtype=np.float32):
        """x about N(1, 4), scale in [0.5, 1.5], bias about N(0, 1), a mask with three slots in four, a cotangent."""
        rng = np.random.default_rng(seed)
        x = rng.normal(1.0, 2.0, self.shape)
        if np.issubdtype(dtype, np.complexfloating):
            x = x + 1j * rng.normal(-1.0, 1.0, self.shape)
        scale, bias = rng.uniform(0.5, 1.5, self.features_shape()), rng.normal(size=self.features_shape())
        mask, cotangent = rng.random(self.shape) < 0.75, rng.normal(size=self.shape)
        return x.astype(dtype), *(a.astype(np.float32) for a in (scale, bias)), mask, cotangent.astype(np.float32)


def weight_standardization(kernel, **kw):
    return jn.standardize(kernel, "h w i o", "h w i", features="o", **kw)[0]


P = functools.partial
BATCH, OTHER = 1e-5, 1e-6  # the default epsilon of batch norm and the verbs, and of every other norm, as in Flax

NORMS = [
    Norm("batch", "... c", "...", "c", (4, 3, 2), jn.batch_norm, BATCH, state={"c": 2}),
    Norm(
        "batch, channels first", "n c ...", "n ...", "c", (4, 2, 3), P(jn.batch_norm, layout="n c ...", over="n ..."),
        BATCH, state={"c": 2},
    ),
    Norm(
        "ghost batch", "(m n) ... c", "n ...", "c", (6, 2, 3),
        P(jn.batch_norm, layout="(m n) ... c", over="n ...", features="c", sizes={"m": 2}),
        BATCH, sizes={"m": 2}, state={"c": 3},
    ),
    Norm(
        "spatially adaptive (SPADE)", "n h w c", "n h w", "n h w c", (2, 3, 2, 2),
        P(jn.batch_norm, layout="n h w c", over="n h w", features="n h w c"), BATCH, state={"c": 2},
    ),
    Norm("layer", "... c", "c", "c", (2, 3, 5), jn.layer_norm, OTHER),
    Norm("layer over two", "n h c", "h c", "h c", (3, 2, 4), P(jn.layer_norm, layout="n h c", over="h c"), OTHER),
    Norm("RMS", "... c", "c", "c", (2, 3, 5), jn.rms_norm, OTHER, center=False),
    Norm("instance", "n ... c", "...", "c", (2, 5, 3), jn.instance_norm, OTHER),
    Norm("adaptive instance (AdaIN)", "n ... c", "...", "n c", (2, 5, 3), P(jn.instance_norm, features="n c"), OTHER),
    Norm("group", "n ... (g k)", "... k", "(g k)", (2, 3, 6), P(jn.group_norm, num_groups=2), OTHER, sizes={"g": 2}),
    Norm(
        "group, channels first", "n (g k) ...", "k ...", "(g k)", (2, 6, 3),
        P(jn.group_norm, num_groups=3, layout="n c ...", features="c"), OTHER, sizes={"g": 3},
    ),
    Norm("weight standardization", "h w i o", "h w i", "o", (2, 3, 2, 3), weight_standardization, BATCH),
]
