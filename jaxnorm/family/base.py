"""A norm as a module, without the module: its settings, the arrays it holds, its call, and what it computes.

A description is a dataclass of settings, keyword-only, with

    _parameters, _statistics     the arrays it holds and how they start, given how long x is along a list of names
    _compute                a call of the function of `jaxnorm.norms` with these arrays
    __call__                the signature, which hands all to `_run`

`_run` is the host's (`jaxnorm.linen.host`, `jaxnorm.nnx.host`): it makes the arrays, passes them through `_step` and
keeps the new state.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.nn.initializers import Initializer, ones, zeros

from jaxnorm.dropin import Given
from jaxnorm.errors import ArgumentError, LayoutError
from jaxnorm.layout import Names, averaged, channels, kept, last, meet, parse, text_of
from jaxnorm.modules import NOTHING, check_names, hashable, inexact, lengths_of, naming, result_dtype
from jaxnorm.moments import Moments, moments
from jaxnorm.normalize import normalize
from jaxnorm.running import RunningStats

Lengths = Callable[[Names], tuple[int, ...]]  # how long x is along names; a composed dimension counts whole
Arrays = Mapping[str, Any]  # what a module holds, by name; None for a parameter it was built without


class Entry(NamedTuple):
    """An array that a module holds, and how it starts: init(key, shape, dtype)."""

    init: Callable[..., jax.Array]
    shape: tuple[int, ...]
    dtype: Any


Entries = dict[str, Entry | None]


@dataclasses.dataclass(kw_only=True, eq=False, repr=False)
class Family:
    """Every norm here. Of its own it has neither parameters nor state."""

    layout: Names = "... c"
    sizes: Mapping[str, int] | None = None
    dtype: Any = None
    param_dtype: Any = jnp.float32

    def _settle(self: Any) -> None:
        """At construction: names that can be read, in values that can be hashed."""
        for field in dataclasses.fields(self):
            value = getattr(self, field.name, None)
            if isinstance(value, list | Mapping):
                setattr(self, field.name, hashable(value))
        with naming(self):
            check_names(self.layout, self.layout, getattr(self, "over", None), getattr(self, "features", None))

    # --- what it holds

    def _parameters(self, lengths: Lengths, *inputs: Any) -> Entries:
        """The parameters for an x of these lengths. At the construction of an nnx module there are no `inputs`."""
        return {}

    def _statistics(self, lengths: Lengths, *inputs: Any) -> dict[str, Entry]:
        return {}

    def _parameter(self, init: Initializer, shape: tuple[int, ...], use: bool = True) -> Entry | None:
        return Entry(init, shape, self.param_dtype) if use else None

    # --- what it computes

    if TYPE_CHECKING:

        def _run(self, x: Any, *inputs: Any, **call: Any) -> Any:
            """The host's: the output for x, with the arrays that it keeps."""

    def _shape(self, x: jax.Array, *inputs: Any) -> tuple[int, ...]:
        """The shape that the layout names."""
        return x.shape

    def _lengths(self, shape: tuple[int, ...]) -> Lengths:
        frame = meet(self.layout, shape, self._sizes)
        return lambda names: lengths_of(frame, names)

    def _step(self, own: Arrays, state: Arrays, x, *inputs, train: bool, sync: bool, **call) -> tuple[Any, Arrays]:
        """The output and the new state. Without `sync` no mapped axis is touched."""
        y = self._compute(own, self._wide(x), *inputs, over=self._over(sync), **self._affine(own, **call))
        return self._rounded(y), state

    def _compute(self, own: Arrays, x: jax.Array, *inputs: Any, over: Names, **call: Any) -> Any:
        raise NotImplementedError

    def _moments(self, x: jax.Array, **call: Any) -> Moments | None:
        """What its running mean and variance are of, where it has them."""
        return None

    def _affine(self, own: Arrays, **call: Any) -> dict[str, Any]:
        """What the call says, with scale and bias for those norms that have them."""
        return call

    def _over(self: Any, sync: bool) -> Names:
        over = getattr(self, "over", NOTHING)
        return over if sync else averaged(self.layout, over) or NOTHING

    @property
    def _sizes(self) -> dict[str, int] | None:
        return dict(self.sizes) if self.sizes else None

    def _wide(self, x: Any) -> jax.Array:
        """x in a dtype that holds it and y: so y, which the functions give in the dtype of x, is rounded once."""
        x = inexact(jnp.asarray(x))
        return x if self.dtype is None else x.astype(result_dtype(None, x, jnp.zeros((), self.dtype)))

    def _rounded(self, outputs: Any) -> Any:
        """Every array that comes out in `dtype`, where one is given. Statistics keep theirs."""
        if self.dtype is None:
            return outputs
        dtype = result_dtype(self.dtype)

        def rounded(z: Any) -> Any:
            if isinstance(z, Moments):
                return z
            if jnp.iscomplexobj(z) and not jnp.issubdtype(dtype, jnp.complexfloating):
                raise ArgumentError(f"dtype {jnp.dtype(dtype).name} cannot hold y, which is complex as x is.")
            return z.astype(dtype)

        return jax.tree.map(rounded, outputs, is_leaf=lambda z: isinstance(z, Moments))


@dataclasses.dataclass(kw_only=True, eq=False, repr=False)
class Gain(Family):
    """With scale and bias along the channels, the one axis that is not averaged."""

    use_scale: bool = True
    use_bias: bool = True
    scale_init: Initializer = ones
    bias_init: Initializer = zeros

    def _along(self: Any) -> Names:
        return channels(self.layout, self.over)

    def _parameters(self, lengths, *inputs):
        shape = lengths(self._along())
        return {
            "scale": self._parameter(self.scale_init, shape, self.use_scale),
            "bias": self._parameter(self.bias_init, shape, self.use_bias),
        }

    def _affine(self, own, scale=None, bias=None, features=None, **call):
        if features is not None and parse(features, "features") != parse(self._along()):
            raise LayoutError(
                f'scale and bias of this norm lie along "{text_of(self._along())}", not along "{text_of(features)}".'
            )
        scale, bias, _ = Given(scale, bias).beside((own["scale"], own["bias"]), self._along())
        return {"scale": scale, "bias": bias, **call}

    def __call__(self, x, *, mask=None, scale=None, bias=None, features=None):
        """Normalize x.

        Args:
            x: array laid out as `layout`.
            mask: True where an element counts; broadcasts to x as in NumPy.
            scale, bias: in the place of parameters, which the module must not have.
            features: the axes of this scale and bias; those of the module by default.

        Returns:
            y, of the shape of x.
        """
        return self._run(x, mask=mask, scale=scale, bias=bias, features=features)


@dataclasses.dataclass(kw_only=True, eq=False, repr=False)
class Featured(Gain):
    """With scale and bias along the features of the norm, which mean more to it than that."""

    features: Names | None = None

    def _default_features(self) -> Names:
        return last(self.layout)

    def _along(self):
        return self._default_features() if self.features is None else self.features

    def _affine(self, own, **call):
        return {**super()._affine(own, **call), "features": self._along()}


@dataclasses.dataclass(kw_only=True, eq=False, repr=False)
class Affine(Featured):
    """With scale and bias along any features, which a call may choose."""

    def _affine(self, own, scale=None, bias=None, features=None, **call):
        given = Given(scale, bias, features).beside((own["scale"], own["bias"]), self._along())
        return {**dict(zip(("scale", "bias", "features"), given, strict=True)), **call}


@dataclasses.dataclass(kw_only=True, eq=False, repr=False)
class Running(Family):
    """With running statistics: evaluation is another line than training."""

    over: Names = "..."
    momentum: float | None = 0.99
    epsilon: float = 1e-5

    def _running(self, state: Arrays) -> Any:
        """The state as the function takes it."""
        raise NotImplementedError

    def _single(self, shape: tuple[int, ...]) -> bool:
        """Whether every statistic is of one element, those of other devices not counted."""
        names = averaged(self.layout, self.over)
        return not names or math.prod(self._lengths(shape)(names)) == 1

    def _step(self, own, state, x, *inputs, train, sync, **call):
        train = train and (sync or not self._single(jnp.shape(x)))  # one example may initialise: as in evaluation
        call = {"over": self._over(sync and train), **self._affine(own, **call)}
        y, running = self._compute(own, self._running(state), self._wide(x), *inputs, train=train, **call)
        return self._rounded(y), {name: getattr(running, name) for name in state}

    @property
    def _options(self) -> dict[str, Any]:
        """What every such function takes."""
        return {"layout": self.layout, "momentum": self.momentum, "epsilon": self.epsilon}


@dataclasses.dataclass(kw_only=True, eq=False, repr=False)
class RunningMoments(Running):
    """With a running mean and variance along the axes that are not averaged."""

    debias: bool = False
    unbiased: bool = False

    def _axes(self) -> tuple[str, ...]:
        return kept(self.layout, self.over)

    def _counts(self) -> bool:
        """Whether the number of updates matters. Where it does not, the state is that of BatchNorm."""
        return self.momentum is None or self.debias

    def _statistics(self, lengths, *inputs):
        shape = lengths(self._axes())
        state = {"mean": Entry(zeros, shape, jnp.float32), "var": Entry(ones, shape, jnp.float32)}
        return state | ({"num_updates": Entry(zeros, (), jnp.int32)} if self._counts() else {})

    def _moments(self, x, *, mask=None, weights=None, **call) -> Moments | None:
        return moments(self._wide(x), self.layout, self.over, mask=mask, weights=weights, sizes=self._sizes)

    def _running(self, state):
        num_updates = state.get("num_updates", jnp.zeros((), jnp.int32))
        return RunningStats(state["mean"], state["var"], num_updates, self._axes())

    def _compute(self, own, running, x, *inputs, train: bool, over, **call) -> tuple[Any, Any]:
        if train:
            return self._train(own, running, x, *inputs, over=over, **self._options, **call)
        return normalize(x, running, self.layout, epsilon=self.epsilon, sizes=self._sizes, **call), running

    def _train(self, own: Arrays, running: RunningStats, x: jax.Array, *inputs: Any, **call: Any) -> tuple[Any, Any]:
        raise NotImplementedError

    @property
    def _options(self):
        return {**super()._options, "debias": self.debias, "unbiased": self.unbiased, "sizes": self._sizes}


@dataclasses.dataclass(kw_only=True, eq=False, repr=False)
class RunningGain(Running, Gain):
    """Running statistics, and scale and bias along the channels."""

    def __call__(
        self, x, use_running_average: bool | None = None, *, mask=None, weights=None, scale=None, bias=None,
        features=None,
    ):  # fmt: skip
        """Normalize x and update the running statistics, or normalize it with these.

        Args:
            x: array laid out as `layout`.
            use_running_average: normalize with the running statistics and change nothing. Here or in the constructor.
            mask: True where an element counts; broadcasts to x as in NumPy.
            weights: how much an element counts, not negative.
            scale, bias: in the place of parameters, which the module must not have.
            features: the axes of this scale and bias; those of the module by default.

        Returns:
            y, of the shape of x.
        """
        return self._run(
            x, use_running_average=use_running_average, mask=mask, weights=weights, scale=scale, bias=bias,
            features=features,
        )  # fmt: skip


@dataclasses.dataclass(kw_only=True, eq=False, repr=False)
class RunningAffine(RunningMoments, RunningGain, Affine):
    """Running mean and variance, and scale and bias along any features: batch norm, and what is called as it is."""

    def _default_features(self):
        return self._axes()
