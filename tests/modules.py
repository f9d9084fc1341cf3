"""Configurations of the Flax modules, and one way to run a linen and an nnx module of jaxnorm or of Flax.

What a configuration should give is said by names alone, through reference.py.
"""

import contextlib
import dataclasses
import functools
import math

import flax
import jax
import jax.numpy as jnp
import numpy as np
import reference
from flax import nnx

import jaxnorm.linen
import jaxnorm.nnx

KINDS = ["BatchNorm", "LayerNorm", "RMSNorm", "GroupNorm", "InstanceNorm"]
HOSTS = {"linen": (jaxnorm.linen, flax.linen), "nnx": (jaxnorm.nnx, flax.nnx)}
EPSILON = {kind: 1e-5 if kind == "BatchNorm" else 1e-6 for kind in KINDS}  # Flax's defaults
KEY = jax.random.key(0)
# Numbers of size up to 6, each a sum of some ten float32 terms: a few roundings of 6 * 6e-8.
CLOSE = {"rtol": 1e-5, "atol": 5e-6}


def build(library, kind, num_features=4, **settings):
    """A module with `num_features` channels."""
    if kind == "GroupNorm" and not {"num_groups", "group_size"} & set(settings):
        settings["num_groups"] = 2
    if library.__name__.endswith("linen"):
        return getattr(library, kind)(**settings)
    return getattr(library, kind)(num_features, rngs=nnx.Rngs(0), **settings)


@contextlib.contextmanager
def rules_of(module):
    """Flax adds bfloat16 to float32 and a vector to a matrix without a word; jaxnorm's modules run strict."""
    if type(module).__module__.startswith("jaxnorm"):
        yield
    else:
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            yield


def pure(module, x, parameters=None):
    """(function, variables): `y, variables = function(variables, x, train=True, **call)`, alike for both hosts."""

    def said(train, call):
        return {"use_running_average": not train, **call} if hasattr(module, "use_running_average") else call

    if isinstance(module, nnx.Module):
        graph, params, stats = nnx.split(module, nnx.Param, ...)
        variables = {"params": nnx.to_pure_dict(params), "batch_stats": nnx.to_pure_dict(stats)}

        def function(variables, x, train=True, **call):
            nnx.replace_by_pure_dict(params, variables["params"])
            nnx.replace_by_pure_dict(stats, variables["batch_stats"])
            own = nnx.merge(graph, params, stats)
            with rules_of(module):
                y = own(x, **said(train, call))
            return y, {**variables, "batch_stats": nnx.to_pure_dict(nnx.split(own, nnx.Param, ...)[2])}

        parameters = {name: value.reshape(-1) for name, value in (parameters or {}).items()}
    else:
        with rules_of(module):
            variables = jax.jit(lambda z: module.init(KEY, z, **said(True, {})))(x)

        def function(variables, x, train=True, **call):
            with rules_of(module):
                y, state = module.apply(variables, x, mutable=["batch_stats"], **said(train, call))
            return y, {**variables, **state}

    return function, {**variables, "params": {**variables.get("params", {}), **(parameters or {})}}


def run(module, x, parameters=None, stats=None, **call):
    """y and batch_stats after one call."""
    function, variables = pure(module, x, parameters)
    if stats is not None:
        variables["batch_stats"] = stats
    y, variables = jax.jit(functools.partial(function, **call))(variables, x)
    return y, variables.get("batch_stats", {})


def shapes(tree):
    return jax.tree.map(lambda a: (jnp.shape(a), jnp.result_type(a)), tree)


@dataclasses.dataclass(frozen=True)
class Case:
    """One configuration of a module, with the names that say what it is."""

    kind: str
    settings: dict
    shape: tuple
    layout: str
    over: str
    features: str
    sizes: dict = dataclasses.field(default_factory=dict)
    mask: tuple | None = None  # its shape
    nnx: bool = True  # False where Flax's nnx, whose state is flat, cannot run it

    def __str__(self):
        settings = ", ".join(f"{k}={v}" for k, v in self.settings.items())
        return f"{self.kind}({settings}){list(self.shape)}" + ("" if self.mask is None else f", mask {list(self.mask)}")

    @property
    def features_shape(self):
        z, names = reference.open_up(np.empty(self.shape), self.layout, self.sizes)
        lengths = tuple(z.shape[names.index(name)] for name in reference.select(names, self.features))
        return (math.prod(lengths),) if "(" in self.features else lengths

    def parameters(self):
        """The names of the parameters."""
        use = {"scale": self.settings.get("use_scale", True), "bias": self.settings.get("use_bias", True)}
        return [name for name in use if use[name] and (self.kind, name) != ("RMSNorm", "bias")]

    def build(self, library, **more):
        return build(library, self.kind, math.prod(self.features_shape), **self.settings, **more)

    def sample(self):
        """x about N(1, 4), random parameters, and a mask of three slots in four that leaves no statistic empty."""
        rng = np.random.default_rng(len(str(self)))
        x = rng.normal(1.0, 2.0, self.shape).astype(np.float32)
        values = {"scale": rng.uniform(0.5, 1.5, self.features_shape), "bias": rng.normal(size=self.features_shape)}
        mask = None if self.mask is None else rng.random(self.mask) < 0.75
        if mask is not None:
            assert (reference.moments(x, self.layout, self.over, mask=mask, sizes=self.sizes).count > 1).all()
        return x, {name: values[name].astype(np.float32) for name in self.parameters()}, mask

    def reference(self, x, parameters, mask):
        """(y, statistics) in float64."""
        return reference.standardize(
            x, self.layout, self.over, features=self.features, sizes=self.sizes, mask=mask,
            center=self.kind != "RMSNorm", epsilon=EPSILON[self.kind], **parameters,
        )  # fmt: skip


CASES = [
    Case("BatchNorm", {}, (6, 3), "n c", "n", "c"),
    Case("BatchNorm", {}, (4, 3, 2), "n h c", "n h", "c"),
    Case("BatchNorm", {"axis": 1, "momentum": 0.5}, (4, 2, 3, 2), "n c h w", "n h w", "c"),
    Case("BatchNorm", {"axis": -2, "use_bias": False}, (4, 2, 3), "n c h", "n h", "c"),
    Case("BatchNorm", {"axis": 0, "use_scale": False}, (3, 5), "c n", "n", "c"),
    Case("BatchNorm", {"axis": (1, -1)}, (5, 2, 2, 3), "n a h c", "n h", "a c", nnx=False),
    Case("BatchNorm", {"axis": (-1, 1)}, (5, 2, 2, 3), "n a h c", "n h", "a c", nnx=False),
    Case("BatchNorm", {}, (4, 3, 2), "n h c", "n h", "c", mask=(4, 3, 2)),
    Case("BatchNorm", {}, (8, 3), "n c", "n", "c", mask=(8, 1)),
    Case("LayerNorm", {}, (2, 3, 5), "n t c", "c", "c"),
    Case("LayerNorm", {"reduction_axes": (1, 2)}, (2, 3, 5), "n t c", "t c", "c"),
    Case("LayerNorm", {"reduction_axes": (1, 2), "feature_axes": (1, 2)}, (2, 3, 5), "n t c", "t c", "t c"),
    Case("LayerNorm", {"reduction_axes": 1, "feature_axes": (-1, 0)}, (2, 3, 5), "n t c", "t", "n c"),
    Case("LayerNorm", {"reduction_axes": (0, 1, 2), "use_scale": False}, (2, 3, 5), "n t c", "n t c", "c"),
    Case("LayerNorm", {"use_bias": False}, (2, 3, 8), "n t c", "c", "c", mask=(2, 3, 8)),
    Case("LayerNorm", {}, (4, 8), "n c", "c", "c", mask=(8,)),
    Case("RMSNorm", {}, (2, 3, 5), "n t c", "c", "c"),
    Case("RMSNorm", {"reduction_axes": (-2, -1), "feature_axes": 1}, (2, 3, 5), "n t c", "t c", "t"),
    Case("RMSNorm", {"use_scale": False}, (2, 3, 8), "n t c", "c", "c", mask=(2, 1, 8)),
    Case("GroupNorm", {"num_groups": 3}, (2, 4, 6), "n h (g k)", "h k", "(g k)", {"g": 3}),
    Case("GroupNorm", {"num_groups": 1}, (2, 6), "n (g k)", "k", "(g k)", {"g": 1}),
    Case("GroupNorm", {"num_groups": None, "group_size": 2}, (2, 4, 6), "n h (g k)", "h k", "(g k)", {"k": 2}),
    Case("GroupNorm", {"num_groups": 2, "use_bias": False}, (2, 3, 2, 4), "n h w (g k)", "h w k", "(g k)", {"g": 2}),
    Case(
        "GroupNorm", {"num_groups": 2, "reduction_axes": (-3, -2, -1)}, (2, 3, 2, 4), "n h w (g k)", "h w k", "(g k)",
        {"g": 2},
    ),
    Case("GroupNorm", {"num_groups": 2}, (2, 5, 6), "n h (g k)", "h k", "(g k)", {"g": 2}, mask=(2, 5, 6)),
    Case("InstanceNorm", {}, (2, 3, 4, 5), "n h w c", "h w", "c"),
    Case("InstanceNorm", {"feature_axes": 1}, (2, 3, 4, 5), "n c h w", "h w", "c"),
    Case("InstanceNorm", {"feature_axes": (1, 3)}, (2, 3, 4, 5), "n h w c", "w", "h c"),
    Case("InstanceNorm", {"use_bias": False}, (2, 6, 3), "n h c", "h", "c", mask=(2, 6, 1)),
    Case("InstanceNorm", {"use_scale": False}, (3, 4), "n c", "", "c"),
]  # fmt: skip
