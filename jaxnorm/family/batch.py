"""The family of batch norm as modules: see `jaxnorm.norms.batch`, `mixed`, `whitening` and `cross_iteration`."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.nn.initializers import Initializer, ones, zeros

from jaxnorm.errors import ArgumentError, nearest
from jaxnorm.family.base import Affine, Entry, RunningAffine, RunningGain, RunningMoments
from jaxnorm.layout import Names, averaged, channels
from jaxnorm.moments import moments
from jaxnorm.normalize import normalize
from jaxnorm.norms.basic import batch_norm
from jaxnorm.norms.batch import (
    Limit,
    batch_renorm,
    frozen_batch_norm,
    ghost_batch_norm,
    streaming_norm,
    virtual_batch_norm,
)
from jaxnorm.norms.cross_iteration import (
    FIELDS,
    CrossIterationHistory,
    cross_iteration_batch_norm,
    cross_iteration_history,
)
from jaxnorm.norms.mixed import batch_channel_norm, switchable_norm
from jaxnorm.norms.sets import select_stats
from jaxnorm.norms.whitening import (
    RunningCovariance,
    decorrelated_batch_norm,
    iterative_norm,
    running_covariance,
)
from jaxnorm.operands import check_count
from jaxnorm.running import update


@dataclasses.dataclass(kw_only=True, eq=False, repr=False)
class GhostBatch(RunningAffine):
    layout: Names = "n ... c"
    over: Names = "n ..."
    num_ghosts: int

    def _single(self, shape):
        return math.prod(self._lengths(shape)(averaged(self.layout, self.over))) == self.num_ghosts

    def _train(self, own, running, x, **call):
        return ghost_batch_norm(x, running, self.num_ghosts, **call)


@dataclasses.dataclass(kw_only=True, eq=False, repr=False)
class Renorm(RunningAffine):
    r_max: Limit = None
    d_max: Limit = None

    def _counts(self):  # a limit left out is the paper's schedule
        return super()._counts() or any(limit is None or callable(limit) for limit in (self.r_max, self.d_max))

    def _train(self, own, running, x, **call):
        return batch_renorm(x, running, r_max=self.r_max, d_max=self.d_max, **call)


@dataclasses.dataclass(kw_only=True, eq=False, repr=False)
class SplitBatch(RunningAffine):
    sets: tuple[str, ...] = ("clean", "adversarial")

    def _moments(self, x, **call):
        return None  # they would be those of one set, where the state is along all

    def _settle(self):
        if isinstance(self.sets, str):
            raise ArgumentError(f'sets are names, as ("clean", "adversarial"), got {self.sets!r}.')
        super()._settle()

    def _statistics(self, lengths, *inputs):
        # each set counts its own updates, so that it has its own debiasing and its own average
        return {name: e._replace(shape=(len(self.sets), *e.shape)) for name, e in super()._statistics(lengths).items()}

    def _compute(self, own, running, x, which, **call):
        if isinstance(which, str):
            if which not in self.sets:
                known = ", ".join(map(repr, self.sets))
                raise ArgumentError(f"there is no set {which!r}, only {known}.{nearest(which, self.sets)}")
            which = self.sets.index(which)
        stacked = dataclasses.replace(running, axes=("set", *running.axes))
        chosen = select_stats(stacked, which)
        if self._counts():
            chosen = dataclasses.replace(chosen, num_updates=running.num_updates[which])
        y, new = super()._compute(own, chosen, x, **call)

        def written(old: jax.Array, z: jax.Array) -> jax.Array:
            if old.ndim == z.ndim:  # updates that are not counted
                return old
            return old.astype(np.promote_types(old.dtype, z.dtype)).at[which].set(z)  # the mean of complex x is complex

        return y, jax.tree.map(written, running, new)

    def _train(self, own, running, x, **call):
        return batch_norm(x, running, **call)

    def __call__(
        self, x, which, use_running_average: bool | None = None, *, mask=None, weights=None, scale=None, bias=None,
        features=None,
    ):  # fmt: skip
        """Normalize x with the statistics of one set.

        Args:
            x: array laid out as `layout`, all of one set.
            which: the set: its name, or its index, which may be traced.
            use_running_average: normalize with the running statistics and change nothing. Here or in the constructor.
            mask: True where an element counts; broadcasts to x as in NumPy.
            weights: how much an element counts, not negative.
            scale, bias: in the place of parameters, which the module must not have.
            features: the axes of this scale and bias; those of the module by default.

        Returns:
            y, of the shape of x.
        """
        return self._run(
            x, which, use_running_average=use_running_average, mask=mask, weights=weights, scale=scale, bias=bias,
            features=features,
        )  # fmt: skip


@dataclasses.dataclass(kw_only=True, eq=False, repr=False)
class FrozenBatch(RunningAffine):
    use_running_average: bool | None = None  # so that it takes the place of BatchNorm: its statistics are never x's

    def _moments(self, x, **call):
        return None

    def _compute(self, own, running, x, *, train, over, **call):
        options = {"epsilon": self.epsilon, "sizes": self._sizes}
        return frozen_batch_norm(x, running, self.layout, **options, **call), running


@dataclasses.dataclass(kw_only=True, eq=False, repr=False)
class Streaming(RunningAffine):
    debias: bool = True

    def _train(self, own, running, x, **call):
        return streaming_norm(x, running, **call)


@dataclasses.dataclass(kw_only=True, eq=False, repr=False)
class VirtualBatch(Affine):
    layout: Names = "n ... c"
    over: Names = "..."
    epsilon: float = 1e-5

    def _compute(self, own, x, reference, *, over, **call):
        options = {"epsilon": self.epsilon, "sizes": self._sizes}
        return virtual_batch_norm(x, reference, self.layout, over, **options, **call)

    def __call__(self, x, reference, *, mask=None, weights=None, scale=None, bias=None, features=None):
        """Normalize every example of x as if it had been added to the reference batch.

        Args:
            x: array laid out as `layout`.
            reference: Moments of the reference batch at this layer, as of `jaxnorm.moments(x, "n ... c", "n ...")`.
            mask: True where an element counts; broadcasts to x as in NumPy.
            weights: how much an element counts, not negative.
            scale, bias: in the place of parameters, which the module must not have.
            features: the axes of this scale and bias; those of the module by default.

        Returns:
            y, of the shape of x.
        """
        return self._run(x, reference, mask=mask, weights=weights, scale=scale, bias=bias, features=features)


@dataclasses.dataclass(kw_only=True, eq=False, repr=False)
class Switchable(RunningAffine):
    layout: Names = "n ... c"
    over: Names = "n ..."
    logits_init: Initializer = ones

    def _parameters(self, lengths, *inputs):
        logits = {name: self._parameter(self.logits_init, (3,)) for name in ("mean_logits", "var_logits")}
        return {**super()._parameters(lengths), **logits}

    def _compute(self, own, running, x, **call):
        return switchable_norm(x, running, own["mean_logits"], own["var_logits"], **self._options, **call)


@dataclasses.dataclass(kw_only=True, eq=False, repr=False)
class BatchChannel(RunningMoments, RunningGain):
    layout: Names = "n ... c"
    over: Names = "n ..."
    num_groups: int

    def _parameters(self, lengths, *inputs):
        own = super()._parameters(lengths)
        return {**own, **{f"channel_{name}": entry for name, entry in own.items()}}

    def _compute(self, own, running, x, **call):
        channel = {name: own[name] for name in ("channel_scale", "channel_bias")}
        return batch_channel_norm(x, running, self.num_groups, **channel, **self._options, **call)

    def __call__(
        self, x, use_running_average: bool | None = None, *, mask=None, scale=None, bias=None, features=None
    ):  # fmt: skip
        """As RunningGain's, without weights, which group norm does not take. scale and bias are the batch norm's."""
        options = {"use_running_average": use_running_average, "scale": scale, "bias": bias, "features": features}
        return self._run(x, mask=mask, **options)


@dataclasses.dataclass(kw_only=True, eq=False, repr=False)
class DecorrelatedBatch(RunningGain):
    layout: Names = "n ... c"
    over: Names = "n ..."
    group_size: int

    def _statistics(self, lengths, *inputs):
        shape = lengths(self._along())
        # evaluated for its shapes, and for what it says of a group_size that does not divide the channels
        start = jax.eval_shape(lambda: running_covariance(self.group_size, "c", c=shape[0]))
        return {
            "mean": Entry(zeros, shape, jnp.float32),
            "cov": Entry(_identities, start.cov.shape, jnp.float32),
            "num_updates": Entry(zeros, (), jnp.int32),
        }

    def _running(self, state):
        return RunningCovariance(**state, axes=(channels(self.layout, self.over),))

    def _compute(self, own, running, x, **call):
        return decorrelated_batch_norm(x, running, **self._options, **call)


def _identities(key: Any, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    return jnp.broadcast_to(jnp.eye(shape[-1], dtype=dtype), shape)


@dataclasses.dataclass(kw_only=True, eq=False, repr=False)
class Iterative(DecorrelatedBatch):
    num_iterations: int = 5

    def _compute(self, own, running, x, **call):
        return iterative_norm(x, running, num_iterations=self.num_iterations, **self._options, **call)


@dataclasses.dataclass(kw_only=True, eq=False, repr=False)
class CrossIteration(RunningMoments, RunningGain):
    """Its x is not what is normalized: that is apply(kernel, x), which the host takes from the layer it wraps."""

    window: int = 4

    def _moments(self, x, **call):
        return None  # x is not what is normalized

    def _shape(self, x, apply, kernel):
        return jax.eval_shape(apply, kernel, x).shape

    def _counts(self):
        return True

    def _statistics(self, lengths, apply, kernel):
        history = jax.eval_shape(lambda kernel: cross_iteration_history(kernel, self.window), kernel)
        past = {f"past_{name}": getattr(history, name) for name in PAST}
        return super()._statistics(lengths) | {name: Entry(zeros, z.shape, z.dtype) for name, z in past.items()}

    def _step(self, own, state, x, apply, kernel, *, train, sync, **call):
        """As a running norm's, with running statistics for evaluation beside the history."""
        affine = self._affine(own, **call)
        running, z = super()._running(state), apply(kernel, x)
        if not train:
            y = normalize(self._wide(z), running, self.layout, epsilon=self.epsilon, sizes=self._sizes, **affine)
            return self._rounded(y), state
        counted = {"mask": affine["mask"], "weights": affine["weights"]}
        over = self._over(sync)
        past = CrossIterationHistory(**{name: state[f"past_{name}"] for name in PAST}, num_updates=state["num_updates"])
        y, past = cross_iteration_batch_norm(
            lambda kernel, x: self._wide(apply(kernel, x)), kernel, x, past, self.layout, over, epsilon=self.epsilon,
            **affine,
        )  # fmt: skip
        stats = moments(z, self.layout, over, **counted)
        if sync:  # not at initialisation
            check_count(z, stats.mean.size, self.layout, over, self._sizes, None)
        running = update(running, stats, self.momentum, debias=self.debias, unbiased=self.unbiased)
        new = {"mean": running.mean, "var": running.var, "num_updates": past.num_updates}
        return self._rounded(y), {**new, **{f"past_{name}": getattr(past, name) for name in PAST}}


PAST = [name for name in FIELDS if name != "num_updates"]


def only_kernel(params: Any) -> jax.Array:
    """The kernel of a layer that has nothing else."""
    leaves = jax.tree.leaves(params)
    if len(leaves) != 1 or set(params) != {"kernel"}:
        raise ArgumentError(
            "it goes around a layer with a kernel and nothing else, a Dense or a Conv with use_bias=False. This one "
            f"has {', '.join(map(str, params)) or 'no parameters'}."
        )
    return leaves[0]
