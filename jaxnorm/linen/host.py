"""How flax.linen holds what `jaxnorm.family` describes."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from flax.linen.transforms import get_module_scopes

from jaxnorm.errors import ArgumentError
from jaxnorm.family.weights import replace, start
from jaxnorm.modules import naming
from jaxnorm.moments import Moments, merge


class Host(nn.Module, kw_only=True):
    """Parameters in params, state in batch_stats. Mixed with a description, which has the call."""

    def __init_subclass__(cls, **kwargs: Any):
        # the call of a description knows no flax: here it becomes a compact method of the module
        home = next((c for c in cls.__mro__ if "__call__" in vars(c)), nn.Module)
        if not issubclass(home, nn.Module):
            cls.__call__ = nn.compact(vars(home)["__call__"])
        super().__init_subclass__(**kwargs)

    def __post_init__(self: Any):
        self._settle()
        super().__post_init__()

    @nn.nowrap
    def _trains(self, use_running_average: bool | None) -> bool:
        return False

    @nn.nowrap
    def _run(self: Any, x, *inputs, use_running_average=None, **call):
        train, initializing = self._trains(use_running_average), self.is_initializing()
        with naming(self, self.path):
            x = jnp.asarray(x)
            lengths = self._lengths(self._shape(x, *inputs))
            own = {
                name: None if entry is None else jnp.asarray(self.param(name, *entry))
                for name, entry in self._parameters(lengths, *inputs).items()
            }
            statistics = self._statistics(lengths, *inputs)
            if statistics:
                need_stats(self, not train)
            state = {
                name: self.variable("batch_stats", name, entry.init, None, entry.shape, entry.dtype)
                for name, entry in statistics.items()
            }
            values = {name: jnp.asarray(variable.value) for name, variable in state.items()}  # NumPy's, if restored
            y, new = self._step(own, values, x, *inputs, train=train, sync=not initializing, **call)
            hand_out(self, lambda: self._moments(x, **call))
            if train and not initializing:
                for name, variable in state.items():
                    variable.value = new[name]
            return y


def both(sown: Moments | None, seen: Moments) -> Moments:
    """A module may be called twice."""
    return seen if sown is None else merge(sown, seen)


def need_stats(module: nn.Module, evaluate: bool) -> None:
    """Statistics that are missing start anew at initialisation and, as in Flax, in training. Nowhere else."""
    fresh = module.is_initializing() or (not evaluate and module.is_mutable_collection("batch_stats"))
    if not (fresh or module.has_variable("batch_stats", "mean")):
        raise ArgumentError(
            'there are no batch_stats of this layer: apply takes {"params": params, "batch_stats": batch_stats}. '
            "Initialise or load them (jaxnorm.tools.check_complete says what a checkpoint lacks), or measure them "
            "(jaxnorm.tools.recalibrate)."
        )


def hand_out(module: nn.Module, stats: Callable[[], Moments | None]) -> None:
    """Sows the moments of what a norm sees, where a call asks for the collection "moments" by name.

    With mutable=True every collection is mutable, also one that has no name: that is no question for moments, and what
    was sown would stay in the variables.
    """
    asked = module.is_mutable_collection("moments") and not module.is_mutable_collection("")
    if asked and not module.is_initializing():
        seen = stats()
        if seen is not None:
            module.sow("moments", "moments", seen, init_fn=lambda: None, reduce_fn=both)


class RunningHost(Host, kw_only=True):
    """For a norm that is trained in one way and evaluated in another."""

    use_running_average: bool | None = None

    @nn.nowrap
    def _trains(self, use_running_average):
        return not nn.merge_param("use_running_average", self.use_running_average, use_running_average)


class Wrapper(nn.Module):
    """A module with other kernels for the time of a call. Mixed with a description of `jaxnorm.family.weights`."""

    layer: nn.Module

    def __post_init__(self: Any):
        self._settle()
        self._need_module(self.layer, nn.Module)
        super().__post_init__()

    @nn.compact
    def __call__(self, *args, **kwargs):
        """Call the layer inside with normalized kernels.

        Args:
            *args, **kwargs: what it takes.

        Returns:
            What it returns.
        """
        return self._call(args, kwargs, train=False)

    @nn.nowrap
    def _call(self: Any, args, kwargs, train: bool):
        own_scope = self.layer.scope.path
        places = iter([path if path != own_scope else () for path in lifted_paths(self.layer)])
        untouched, found = [], 0

        def inside(variables: Any) -> Any:
            """Called once for each scope that the layer reaches, in their order: its parameters, normalized."""
            nonlocal found
            place = next(places)
            name = "_".join(("norm", *place[len(self.path) - 1 :]))
            untouched.append(variables)
            params = variables.get("params", {})
            kernels = self._kernels(nn.meta.unbox(params))
            found += len(kernels)
            if not kernels:
                return variables
            parameters, entries = self._entries(kernels)
            own = self.param(name, lambda key: start(parameters, key)) if any(parameters.values()) else {}
            state = None
            if any(entries.values()):
                state = self.variable("batch_stats", name, lambda: start(entries, self.make_rng("params")))
            new, after = self._step(own, state.value if state else {}, kernels, train)
            if state and train and not self.is_initializing():
                state.value = after
            return {**variables, "params": replace(params, new)}

        def outside(variables: Any) -> Any:
            """At initialisation flax asks what to keep, first before `inside` and then after it: the layer's own."""
            return untouched.pop(0) if untouched else variables

        def call(layer: nn.Module) -> Any:
            return layer(*args, **kwargs)

        with naming(self, self.path):
            y = nn.map_variables(call, "params", inside, outside, init=self.is_initializing())(self.layer)
            self._need(found, self.layer.variables.get("params", {}))
        return y


def lifted_paths(layer: nn.Module) -> list[tuple[str, ...]]:
    """Where the variables lie that a layer reaches: its own scope, and those of layers it was given that their parent
    made. In the order of flax's lifted transforms, and without scopes that lie in another."""
    scopes = dict.fromkeys(get_module_scopes(layer)[0])
    paths = [scope.path for scope in scopes]
    return [path for path in paths if not any(path[: len(p)] == p and path != p for p in paths)]
