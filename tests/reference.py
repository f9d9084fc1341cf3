"""Every statistic and norm once more, in float64 NumPy with loops: what the tests compare jaxnorm with.

Nothing is imported from jax or jaxnorm and nothing is clever: an element belongs to the statistic that shares its
indices along the names that are not averaged over, and a statistic is a sum over the elements that belong to it.
"""

import math
import re
from collections import defaultdict
from typing import NamedTuple

import numpy as np


class Stats(NamedTuple):
    """Count, mean and centred sum of squares, laid out along `axes` (a list of names)."""

    count: np.ndarray
    mean: np.ndarray
    m2: np.ndarray
    axes: list

    @property
    def var(self):
        return np.where(self.count > 0, self.m2 / np.where(self.count > 0, self.count, 1), 0)

    @property
    def var_unbiased(self):
        return np.where(self.count > 1, self.m2 / np.where(self.count > 1, self.count - 1, 1), 0)


def open_up(x, layout, sizes=None):
    """`x` with one dimension a name, and the names: "(m n) ... c" and shape (6, 4, 5) give m n ...0 c."""
    tokens = re.findall(r"\([^)]*\)|\S+", layout)
    names, shape, dims = [], [], list(x.shape)
    for token in tokens:
        if token == "...":
            for i in range(x.ndim - len(tokens) + 1):
                names.append(f"...{i}")
                shape.append(dims.pop(0))
        elif token.startswith("("):
            parts, length = token[1:-1].split(), dims.pop(0)
            known = math.prod(sizes[part] for part in parts if part in sizes)
            names += parts
            shape += [sizes[part] if part in sizes else length // known for part in parts]
        else:
            names.append(token)
            shape.append(dims.pop(0))
    return x.reshape(shape), names


def select(names, words):
    """Those of `names` that `words` speaks of, in the order of `words`."""
    words = words.replace("(", " ").replace(")", " ").split()
    return [name for word in words for name in names if name == word or (word == "..." and name.startswith("..."))]


def wide(x):
    return np.asarray(x).astype(complex if np.iscomplexobj(x) else float)


def pool(shards, layout, over, *, center=True, sizes=None):
    """The statistics of all elements of several shards `[(x, mask, weights), ...]` taken together."""
    members = defaultdict(list)
    for x, mask, weights in shards:
        x = wide(x)
        weight = np.ones(x.shape) if weights is None else np.broadcast_to(wide(weights), x.shape)
        if mask is not None:
            weight = np.where(np.broadcast_to(mask, x.shape), weight, 0)
        x, names = open_up(x, layout, sizes)
        weight, _ = open_up(weight, layout, sizes)
        kept = [i for i, name in enumerate(names) if name not in select(names, over)]
        for index in np.ndindex(x.shape):
            if weight[index] > 0:
                members[tuple(index[i] for i in kept)].append((x[index], weight[index]))
    shape = [x.shape[i] for i in kept]
    count, mean, m2 = np.zeros(shape), np.zeros(shape, x.dtype), np.zeros(shape)
    for index, pairs in members.items():
        count[index] = sum(w for _, w in pairs)
        if center:
            mean[index] = sum(w * v for v, w in pairs) / count[index]
        m2[index] = sum(w * abs(v - mean[index]) ** 2 for v, w in pairs)
    return Stats(count, mean, m2, [names[i] for i in kept])


def moments(x, layout, over, *, mask=None, weights=None, center=True, sizes=None):
    return pool([(x, mask, weights)], layout, over, center=center, sizes=sizes)


def normalize(x, mean, var, axes, layout, *, scale=None, bias=None, features="", epsilon=1e-5, mask=None, sizes=None):
    """(x - mean) / sqrt(var + epsilon) * scale + bias: mean and var along `axes`, scale and bias along `features`."""
    x = wide(x)
    if mask is not None:
        x = np.where(~np.broadcast_to(mask, x.shape) & ~np.isfinite(x), 0, x)
    z, names = open_up(x, layout, sizes)
    along = select(names, features)
    lengths = [z.shape[names.index(name)] for name in along]
    scale = np.ones(lengths) if scale is None else wide(scale).reshape(lengths)
    bias = np.zeros(lengths) if bias is None else wide(bias).reshape(lengths)
    y = np.zeros_like(z)
    for index in np.ndindex(z.shape):
        at = dict(zip(names, index, strict=True))
        i, j = tuple(at[name] for name in axes), tuple(at[name] for name in along)
        y[index] = (z[index] - mean[i]) / math.sqrt(var[i] + epsilon) * scale[j] + bias[j]
    return y.reshape(x.shape)


def standardize(x, layout, over, *, mask=None, weights=None, center=True, sizes=None, **affine):
    """`x` normalized by its own statistics, and those statistics."""
    stats = moments(x, layout, over, mask=mask, weights=weights, center=center, sizes=sizes)
    return normalize(x, stats.mean, stats.var, stats.axes, layout, mask=mask, sizes=sizes, **affine), stats


def running(batches, momentum, *, debias=False, start=(0.0, 1.0)):
    """What stays of `batches`, a list of (mean, var), after all of them: the closed sum, not the recursion.

    Batch i of T weighs (1 - momentum) momentum^(T-1-i) and the start momentum^T. `debias` leaves the start out and
    divides by what the rest weighs, 1 - momentum^T. `momentum=None` weighs every batch alike.
    """
    steps = len(batches)
    if momentum is None:
        weights, rest = [1 / steps] * steps, 0.0
    else:
        weights, rest = [(1 - momentum) * momentum ** (steps - 1 - i) for i in range(steps)], momentum**steps
        if debias:
            weights, rest = [w / (1 - rest) for w in weights], 0.0
    return tuple(
        rest * first + sum(w * batch[i] for w, batch in zip(weights, batches, strict=True))
        for i, first in enumerate(start)
    )


def gradients(function, arguments, step=1e-5):
    """Central differences of a number by every array given: off by step^2 f''' / 6 + 1e-16 |f| / step, 1e-9 here."""
    arguments = [np.array(wide(a)) for a in arguments]
    result = [np.zeros_like(a) for a in arguments]
    for argument, gradient in zip(arguments, result, strict=True):
        for index in np.ndindex(argument.shape):
            value = argument[index]
            argument[index] = value + step
            above = function(*arguments)
            argument[index] = value - step
            below = function(*arguments)
            argument[index] = value
            gradient[index] = (above - below) / (2 * step)
    return result
