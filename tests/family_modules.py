"""The Flax modules beyond the five of modules.py: their functions, what they hold, and one way to run them.

All take x [n, h, c].
"""

import dataclasses
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from modules import HOSTS, KEY

import jaxnorm as jn

RNG = np.random.default_rng(0)
N, H, C = 4, 3, 8
CLOSE = {"rtol": 1e-5, "atol": 1e-5}  # float32 sums of some ten terms of size up to 6, in another order


def random(*shape, mean=0.0):
    return RNG.normal(mean, 1.0, shape).astype(np.float32)


X, RESIDUAL, STYLE = random(N, H, C, mean=1.0), random(N, H, C), random(N, 5, C, mean=2.0)
CONDITION, LABELS = random(N, 5), np.array([2, 0, 1, 2])


# --- one way to run a module of either host


def build(host, module, inside=None, num_features=C, **settings):
    """`inside` makes the layer of this host that a module goes around."""
    library, nnx_only = HOSTS[host][0], {} if host == "linen" else {"rngs": nnx.Rngs(0)}
    if module in ("AdaptiveLayerNorm", "FiLM") and nnx_only:
        settings["condition_features"] = 5
    if inside is not None:
        return getattr(library, module)(inside(host), **settings, **({} if module == "AddNorm" else nnx_only))
    return getattr(library, module)(*[num_features] * len(nnx_only), **settings, **nnx_only)


def dense(host):
    return nn.Dense(C) if host == "linen" else nnx.Linear(C, C, rngs=nnx.Rngs(0))


def dense_without_bias(host):
    return nn.Dense(C, use_bias=False) if host == "linen" else nnx.Linear(C, C, use_bias=False, rngs=nnx.Rngs(0))


def layer_norm(host):
    return build(host, "LayerNorm")


def pure(module, *inputs, **call):
    """(function, variables): `outputs, variables = function(variables, *inputs, **call)`, alike for both hosts."""
    if isinstance(module, nnx.Module):
        graph, params, stats = nnx.split(module, nnx.Param, ...)

        def function(variables, *inputs, **call):
            nnx.replace_by_pure_dict(params, variables["params"])
            nnx.replace_by_pure_dict(stats, variables["batch_stats"])
            own = nnx.merge(graph, params, stats)
            outputs = own(*inputs, **call)
            return outputs, {**variables, "batch_stats": nnx.to_pure_dict(nnx.split(own, nnx.Param, ...)[2])}

        return function, {"params": nnx.to_pure_dict(params), "batch_stats": nnx.to_pure_dict(stats)}

    def function(variables, *inputs, **call):
        outputs, state = module.apply(variables, *inputs, mutable=["batch_stats"], **call)
        return outputs, {**variables, **state}

    return function, {"params": {}, "batch_stats": {}, **module.init(KEY, *inputs, **call)}


def same(tree, expected, **close):
    assert jax.tree.structure(tree) == jax.tree.structure(expected)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **(close or CLOSE)), tree, expected)


# --- the functions


def running(s, axes=("c",)):
    return jn.RunningStats(s["mean"], s["var"], s.get("num_updates", jnp.zeros((), jnp.int32)), axes)


def kept(s, new):
    return {name: getattr(new, name) for name in s}


def batch(function, *given, own=(), **options):
    """A norm of (x, running, *given, *own): evaluation is `normalize`."""

    def call(p, s, x, *inputs, train):
        affine = {"scale": p.get("scale"), "bias": p.get("bias")}
        if not train:
            return jn.normalize(x, running(s), **affine), s
        y, new = function(x, running(s), *given, *(p[name] for name in own), *inputs, **affine, **options)
        return y, kept(s, new)

    return call


def switching(function, *given, own=(), named=(), state=running):
    """A norm that has its evaluation itself."""

    def call(p, s, x, train):
        more = {name: p[name] for name in ("scale", "bias", *named)}
        y, new = function(x, state(s), *given, *(p[name] for name in own), **more, train=train)
        return y, kept(s, new)

    return call


def plain(function, *given, own=(), names=("scale", "bias"), **options):
    def call(p, s, x, *inputs, train):
        return function(x, *given, *(p[n] for n in own), *inputs, **{n: p[n] for n in names}, **options), s

    return call


def frozen(p, s, x, train):
    return jn.frozen_batch_norm(x, running(s), **p), s


def split(p, s, x, train):
    if not train:
        return jn.normalize(x, jn.select_stats(running(s, ("set", "c")), 1), **p), s
    y, new = jn.split_batch_norm(x, running(s, ("set", "c")), 1, **p)
    return y, kept(s, new)


def cross_iteration(p, s, x, train):
    def layer(kernel, x):
        return x @ kernel

    gain, kernel = {"scale": p["scale"], "bias": p["bias"]}, p["layer"]["kernel"]
    if not train:
        return jn.normalize(layer(kernel, x), running(s), **gain), s
    fields = [field.name for field in dataclasses.fields(jn.CrossIterationHistory)]
    history = jn.CrossIterationHistory(*(s[name if name == "num_updates" else f"past_{name}"] for name in fields))
    y, new = jn.cross_iteration_batch_norm(layer, kernel, x, history, **gain)
    after = jn.update(running(s), jn.moments(layer(kernel, x)))
    past = {f"past_{name}": getattr(new, name) for name in fields if name != "num_updates"}
    return y, {"mean": after.mean, "var": after.var, "num_updates": new.num_updates, **past}


def linear(p, condition, parts):
    return jnp.split(condition @ p["kernel"] + jnp.broadcast_to(p["bias"], (N, parts * C)), parts, axis=-1)


def adaptive_layer(p, s, x, condition, train):
    scale, bias, gate = linear(p, jax.nn.silu(condition), 3)
    return (jn.adaptive_layer_norm(x, scale, bias), gate), s


def film(p, s, x, condition, train):
    return jn.film(x, *linear(p, condition, 2), scale_offset=1.0), s


def conditional(p, s, x, labels, train):
    if train:
        y, new = jn.conditional_batch_norm(x, running(s), labels, **p)
        return y, kept(s, new)
    return jn.normalize(x, running(s), "n ... c", scale=p["scale"][labels], bias=p["bias"][labels], features="n c"), s


def spade(p, s, x, scale, bias, train):
    if train:
        y, new = jn.spade(x, running(s), scale, bias)
        return y, kept(s, new)
    return jn.normalize(x, running(s), "n ... c", scale=1 + scale, bias=bias, features="n ... c"), s


def add_norm(p, s, x, residual, train):
    return jn.add_norm(x, residual, **p["norm"]), s


def covariance(s):
    return jn.RunningCovariance(s["mean"], s["cov"], s["num_updates"], ("c",))


def weights(function):
    def call(p, s, x, train):
        kernel = function(p["layer"]["kernel"], **p.get("norm", {}).get("kernel", {}))
        return x @ kernel + jnp.broadcast_to(p["layer"]["bias"], x.shape), s

    return call


def spectral(p, s, x, train):
    state = jn.SpectralState(**s["norm"]["kernel"], axes=("o",))
    kernel, new = jn.spectral_norm(p["layer"]["kernel"], state, num_steps=2 if train else 0)
    y = x @ kernel + jnp.broadcast_to(p["layer"]["bias"], x.shape)
    return y, {"norm": {"kernel": kept(s["norm"]["kernel"], new)}} if train else s


@dataclasses.dataclass(frozen=True)
class Case:
    """`function(parameters, state, *inputs, train=) -> (outputs, state)`; `start` is what the parameters start with."""

    module: str
    function: Callable
    settings: dict = dataclasses.field(default_factory=dict)
    start: dict = dataclasses.field(default_factory=lambda: {"scale": 1.0, "bias": 0.0})
    state: str = ""
    inputs: tuple = ()
    call: dict = dataclasses.field(default_factory=dict)
    inside: Callable | None = None
    over: str | None = None

    def build(self, host, **more):
        return build(host, self.module, self.inside, **self.settings, **more)

    def switch(self, train):
        """What a call says of training."""
        return self.call | ({"use_running_average": not train} if self.state else {})


SCALE, CHANNEL = {"scale": 1.0}, {"scale": 1.0, "bias": 0.0, "channel_scale": 1.0, "channel_bias": 0.0}
SWITCH = ("mean_logits", "var_logits")
PAST = " ".join(f"past_{name}" for name in ("kernel", "mean", "var", "dmean", "dvar", "counted"))
NORM = {"layer": {"bias": 0.0}, "norm": {"kernel": {"scale": 1.0}}}  # kernels start at random

CASES = [
    Case("GhostBatchNorm", batch(jn.ghost_batch_norm, 2), {"num_ghosts": 2}, state="mean var", over="n ..."),
    Case("BatchRenorm", batch(jn.batch_renorm), state="mean num_updates var", over="..."),
    Case("SplitBatchNorm", split, state="mean var", call={"which": "adversarial"}, over="..."),
    Case("FrozenBatchNorm", frozen, state="mean var", over="..."),
    Case("StreamingNorm", batch(jn.streaming_norm), state="mean num_updates var", over="..."),
    Case(
        "CrossIterationBatchNorm", cross_iteration, {"window": 3}, {"scale": 1.0, "bias": 0.0, "layer": {}},
        f"mean num_updates {PAST} var", inside=dense_without_bias, over="...",
    ),
    Case(
        "VirtualBatchNorm", plain(jn.virtual_batch_norm), inputs=(jn.moments(STYLE, "n t c", "n t"),), over="...",
    ),
    Case("AdaptiveInstanceNorm", plain(jn.adaptive_instance_norm, names=()), start={}, inputs=(STYLE,), over="..."),
    Case("AdaptiveLayerNorm", adaptive_layer, start={"kernel": 0.0, "bias": 0.0}, inputs=(CONDITION,), over="c"),
    Case("FiLM", film, start={"kernel": 0.0, "bias": 0.0}, inputs=(CONDITION,)),
    Case("ConditionalBatchNorm", conditional, {"num_classes": 3}, state="mean var", inputs=(LABELS,), over="n ..."),
    Case("SPADE", spade, start={}, state="mean var", inputs=(X[::-1], RESIDUAL), over="n ..."),
    Case("PartialRMSNorm", plain(jn.partial_rms_norm, 0.6, names=("scale",)), {"fraction": 0.6}, SCALE),
    Case("ScaleNorm", plain(jn.scale_norm, own=("scale",), names=()), start={"scale": C**0.5}, over="c"),
    Case("L2Norm", plain(jn.l2_norm, names=("scale",)), start=SCALE, over="c"),
    Case(
        "QKNorm", plain(jn.qk_norm, names=("query_scale", "key_scale")),
        start={"query_scale": 1.0, "key_scale": 1.0}, inputs=(RESIDUAL,), over="d",
    ),
    Case("GatedRMSNorm", plain(jn.gated_rms_norm, names=("scale",)), start=SCALE, inputs=(RESIDUAL,), over="c"),
    Case("AddNorm", add_norm, start={"norm": {"scale": 1.0, "bias": 0.0}}, inputs=(RESIDUAL,), inside=layer_norm),
    Case("PositionalNorm", plain(jn.positional_norm, names=()), start={}, over="c"),
    Case("DynamicTanh", plain(jn.dynamic_tanh, own=("alpha",)), start={"alpha": 0.5, "scale": 1.0, "bias": 0.0}),
    Case(
        "DynamicErf", plain(jn.dynamic_erf, own=("alpha", "shift")),
        start={"alpha": 0.5, "shift": 0.0, "scale": 1.0, "bias": 0.0},
    ),
    Case("GlobalResponseNorm", plain(jn.global_response_norm), start={"scale": 0.0, "bias": 0.0}, over="..."),
    Case(
        "FilterResponseNorm", plain(jn.filter_response_norm, own=("threshold",)),
        start={"scale": 1.0, "bias": 0.0, "threshold": 0.0}, over="...",
    ),
    Case(
        "LocalResponseNorm", plain(jn.local_response_norm, 3, names=(), alpha=0.5), {"size": 3, "alpha": 0.5}, {},
    ),
    Case(
        "EvoNormB0", switching(jn.evo_norm_b0, named=("v",)), start={"scale": 1.0, "bias": 0.0, "v": 1.0},
        state="mean var", over="n ...",
    ),
    Case(
        "EvoNormS0", plain(jn.evo_norm_s0, 2, names=("v", "scale", "bias")), {"num_groups": 2},
        {"scale": 1.0, "bias": 0.0, "v": 1.0},
    ),
    Case(
        "SwitchableNorm", switching(jn.switchable_norm, own=SWITCH),
        start={"scale": 1.0, "bias": 0.0, "mean_logits": 1.0, "var_logits": 1.0}, state="mean var", over="n ...",
    ),
    Case(
        "BatchChannelNorm", switching(jn.batch_channel_norm, 2, named=("channel_scale", "channel_bias")),
        {"num_groups": 2}, CHANNEL, "mean var", over="n ...",
    ),
    Case(
        "DecorrelatedBatchNorm", switching(jn.decorrelated_batch_norm, state=covariance), {"group_size": 4},
        state="cov mean num_updates", over="n ...",
    ),
    Case(
        "IterativeNorm", switching(jn.iterative_norm, state=covariance), {"group_size": 4},
        state="cov mean num_updates", over="n ...",
    ),
    Case("WeightNorm", weights(jn.weight_norm), start=NORM, inside=dense),
    Case("WeightStandardization", weights(jn.weight_standardization), {"use_scale": True}, NORM, inside=dense),
    Case("ScaledWeightStandardization", weights(jn.scaled_weight_standardization), start=NORM, inside=dense),
    Case("SpectralNorm", spectral, {"num_steps": 2}, {"layer": {"bias": 0.0}}, "norm", inside=dense),
]  # fmt: skip
