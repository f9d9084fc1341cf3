"""How flax.nnx holds what `jaxnorm.family` describes."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.module import first_from

from jaxnorm.family.weights import start
from jaxnorm.modules import naming
from jaxnorm.moments import Moments, merge


def fitted(value: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """nnx keeps every parameter flat. One of another size stays as it is, for the verbs to name."""
    value = jnp.asarray(value)  # NumPy's, if restored
    return value.reshape(shape) if value.size == math.prod(shape) else value


class BatchMoments(nnx.Variable):
    """Moments of what a norm with running statistics sees, by `nnx.capture(model, BatchMoments)`."""


def both(sown: Moments | None, seen: Moments) -> Moments:
    """A module may be called twice."""
    return seen if sown is None else merge(sown, seen)


def hand_out(module: Any, stats: Callable[[], Moments | None]) -> None:
    """Sows the moments of what a norm sees, where `nnx.capture` asks for BatchMoments."""
    if any(type(kind) is BatchMoments for kind in getattr(module, "__captures__", ())):
        seen = stats()
        if seen is not None:
            module.sow(BatchMoments, "moments", seen, init_fn=lambda: None, reduce_fn=both)


class Holder(nnx.Module):
    """Parameters as Param, state as BatchStat, by the words of the description that it is mixed with."""

    def _build(self: Any, num_features: int | None, rngs: Any, *inputs: Any) -> None:
        self._settle()

        def lengths(names: Any) -> tuple[int | None, ...]:
            return (num_features,)

        with naming(self):
            for name, entry in self._parameters(lengths, *inputs).items():
                made = None if entry is None else nnx.Param(entry.init(rngs.params(), entry.shape, entry.dtype))
                setattr(self, name, nnx.data(made))
            for name, entry in self._statistics(lengths, *inputs).items():
                setattr(self, name, nnx.BatchStat(entry.init(None, entry.shape, entry.dtype)))

    def _trains(self, use_running_average: bool | None) -> bool:
        return False

    def _run(self: Any, x, *inputs, use_running_average=None, **call):
        train = self._trains(use_running_average)
        with naming(self):
            x = jnp.asarray(x)
            lengths = self._lengths(self._shape(x, *inputs))
            own = {
                name: None if entry is None else fitted(getattr(self, name)[...], entry.shape)
                for name, entry in self._parameters(lengths, *inputs).items()
            }
            state = {
                name: fitted(getattr(self, name)[...], entry.shape)
                for name, entry in self._statistics(lengths, *inputs).items()
            }
            y, new = self._step(own, state, x, *inputs, train=train, sync=True, **call)
            hand_out(self, lambda: self._moments(x, **call))
            if train:
                for name in state:
                    variable = getattr(self, name)
                    variable.set_value(new[name].reshape(variable.shape))
            return y


@dataclasses.dataclass(eq=False, repr=False)
class Host(Holder):
    """A norm of num_features channels."""

    num_features: int
    _: dataclasses.KW_ONLY
    rngs: dataclasses.InitVar[nnx.Rngs]

    def __post_init__(self, rngs: nnx.Rngs):
        self._build(self.num_features, rngs)


@dataclasses.dataclass(eq=False, repr=False)
class BareHost(Holder):
    """A norm that holds nothing: it may be built as the others are, and need not."""

    num_features: int | None = None
    _: dataclasses.KW_ONLY
    rngs: dataclasses.InitVar[nnx.Rngs | None] = None

    def __post_init__(self, rngs: nnx.Rngs | None):
        self._build(self.num_features, rngs)


@dataclasses.dataclass(eq=False, repr=False)
class Switch(nnx.Module):
    """For what is trained in one way and evaluated in another."""

    _: dataclasses.KW_ONLY
    use_running_average: bool | None = False

    def _trains(self, use_running_average: bool | None) -> bool:
        error = "use_running_average is needed: in the constructor, in the call, or through nnx.view."
        return not first_from(use_running_average, self.use_running_average, error_msg=error)

    def set_view(self, use_running_average: bool | None = None):
        """Called by `nnx.view`.

        Args:
          use_running_average: normalize with the running statistics instead of those of x.
        """  # nnx.view_info reads this, and its arguments stand two spaces in
        if use_running_average is not None:
            self.use_running_average = use_running_average


@dataclasses.dataclass(eq=False, repr=False)
class RunningHost(Switch, Host):
    """A norm of num_features channels with running statistics."""


@dataclasses.dataclass(eq=False, repr=False)
class Wrapper(nnx.Module):
    """A module with other kernels for the time of a call. Mixed with a description of `jaxnorm.family.weights`."""

    layer: nnx.Module
    _: dataclasses.KW_ONLY
    rngs: dataclasses.InitVar[nnx.Rngs | None] = None

    def __post_init__(self: Any, rngs: nnx.Rngs | None):
        self._settle()
        self._need_module(self.layer, nnx.Module)
        with naming(self):
            kernels = self._found()
            parameters, state = self._entries(kernels)
            key = None if rngs is None else rngs.params()
            parameters, state = (start(entries, key) for entries in (parameters, state))
            held = [jax.tree.map(kind, tree) for kind, tree in ((nnx.Param, parameters), (nnx.BatchStat, state))]
        self.norm = nnx.data(merged(*held))

    def _found(self: Any) -> dict:
        """The kernels, whatever kind of Variable they are: one that is frozen by its type is normalized as well."""
        variables = nnx.to_pure_dict(nnx.state(self.layer))
        kernels = self._kernels(variables)
        self._need(len(kernels), variables)
        return kernels

    def __call__(self, *args, **kwargs):
        """Call the module inside with normalized kernels.

        Args:
            *args, **kwargs: what it takes.

        Returns:
            What it returns.
        """
        return self._call(args, kwargs, train=False)

    def _call(self: Any, args, kwargs, train: bool):
        with naming(self):
            kernels = self._found()
            values = [values_of(self.norm, kind) for kind in (nnx.Param, nnx.BatchStat)]
            new, after = self._step(*values, kernels, train)
            if train:
                set_values(self.norm, after)
        return with_kernels(self.layer, new)(*args, **kwargs)


def merged(a: Any, b: Any) -> Any:
    """Two nested dicts in one."""
    return {**a, **b, **{k: merged(a[k], b[k]) for k in a.keys() & b.keys()}} if isinstance(a, dict) else b


def values_of(held: Any, kind: type) -> dict:
    """The values of the Variables of one kind in a nested dict."""
    return {
        name: values_of(v, kind) if isinstance(v, Mapping) else v[...]
        for name, v in held.items() if isinstance(v, Mapping | kind)
    }  # fmt: skip


def set_values(held: Any, new: Mapping) -> None:
    for name, value in new.items():
        if isinstance(value, Mapping):
            set_values(held[name], value)
        else:
            held[name].set_value(value)


def with_kernels(layer: nnx.Module, new: dict[tuple[str, ...], jax.Array]) -> Any:
    """The layer with other values at these paths. All other Variables are its own, so that it updates its state. What a
    call makes anew on it, by `sow` or as a plain attribute, is lost: it is a copy."""

    def names(path: tuple) -> tuple[str, ...]:
        return tuple(map(str, path))

    graph, kernels, rest = nnx.split(layer, lambda path, _: names(path) in new, ...)
    kernels = nnx.from_flat_state([(path, old.replace(new[names(path)])) for path, old in nnx.to_flat_state(kernels)])
    return nnx.merge(graph, kernels, rest)
