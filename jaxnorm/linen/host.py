"""How flax.linen holds what `jaxnorm.family` describes."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from jaxnorm import dropin
from jaxnorm.family.weights import replace, start


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
        with dropin.naming(self, self.path):
            x = jnp.asarray(x)
            lengths = self._lengths(self._shape(x, *inputs))
            own = {
                name: None if entry is None else jnp.asarray(self.param(name, *entry))
                for name, entry in self._parameters(lengths, *inputs).items()
            }
            state = {
                name: self.variable("batch_stats", name, entry.init, None, entry.shape, entry.dtype)
                for name, entry in self._statistics(lengths, *inputs).items()
            }
            values = {name: jnp.asarray(variable.value) for name, variable in state.items()}  # NumPy's, if restored
            y, new = self._step(own, values, x, *inputs, train=train, sync=not initializing, **call)
            if train and not initializing:
                for name, variable in state.items():
                    variable.value = new[name]
            return y


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
        if self.is_initializing():
            self.layer(*args, **kwargs)  # makes its parameters, which then stay as they are
        with dropin.naming(self, self.path):
            kernels = self._kernels(nn.meta.unbox(self.layer.variables.get("params", {})))
            parameters, entries = self._entries(kernels)
            own = self.param("norm", lambda key: start(parameters, key)) if any(parameters.values()) else {}
            state = None
            if any(entries.values()):
                key = None if self.has_variable("batch_stats", "norm") else self.make_rng("params")
                state = self.variable("batch_stats", "norm", start, entries, key)
            new, after = self._step(own, state.value if state else {}, kernels, train)
            if state and train and not self.is_initializing():
                state.value = after

        def inside(variables: Any) -> Any:
            return {**variables, "params": replace(variables["params"], new)}

        return nn.map_variables(lambda layer: layer(*args, **kwargs), "params", inside)(self.layer)
