"""Every norm of `jn.norms()` beyond the five of table.py: a call of its function, and what its paper says of it.

All take x [n, h, c] (a kernel for the norms of weights) and a dict of parameters, and give y and what they carry on.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
import papers

import jaxnorm as jn

N, H, C = 4, 3, 4
LAYOUT = "n h c"


@dataclasses.dataclass(frozen=True)
class Case:
    """`ours(x, parameters, state, mask, over)` and `paper(x, parameters, state, mask)` give (y, state).

    `over` is a function that adds a mapped axis to the axes averaged. `state` is what the first step is given; the
    paper's is `arrays(state)`.
    """

    name: str
    ours: Callable
    paper: Callable
    parameters: tuple[str, ...] = ("scale", "bias")
    state: Any = None
    masks: bool = True
    sharded: int | None = None  # the dimension whose parts may lie on several devices
    constants: Callable | None = None  # (x, parameters, state, mask) -> the paper's y with what has no gradient fixed
    shape: tuple[int, ...] = (N, H, C)
    close: dict = dataclasses.field(default_factory=dict)  # tolerances, where they are not those of all
    rounded: int = 1  # how often y is rounded to the dtype of x on its way

    def sample(self, seed=0):
        """x about N(1, 4), parameters, a mask with three slots in four, a cotangent."""
        rng = np.random.default_rng(seed)
        x, cotangent = rng.normal(1.0, 2.0, self.shape), rng.normal(size=self.shape)
        mask = rng.random(self.shape) < 0.75
        made = {name: PARAMETERS[name](rng, self.shape[-1]).astype(np.float32) for name in self.parameters}
        return x.astype(np.float32), made, mask if self.masks else None, cotangent.astype(np.float32)


def near_one(rng, c):
    return rng.uniform(0.5, 1.5, c)


def near_zero(rng, c):
    return rng.normal(size=c)


PARAMETERS = {
    "scale": near_one, "bias": near_zero, "channel_scale": near_one, "channel_bias": near_zero, "v": near_one,
    "query_scale": near_one, "key_scale": near_one, "threshold": lambda rng, c: rng.normal(-0.5, 0.1, c),
    "one": lambda rng, c: rng.uniform(1.0, 2.0, ()), "alpha": lambda rng, c: rng.uniform(0.3, 0.6, ()),
    "shift": lambda rng, c: rng.normal(size=()), "mean_logits": lambda rng, c: rng.normal(size=3),
    "var_logits": lambda rng, c: rng.normal(size=3), "rows_scale": lambda rng, c: rng.uniform(-0.5, 0.5, (N, c)),
    "rows_bias": lambda rng, c: rng.normal(size=(N, c)), "class_scale": lambda rng, c: rng.uniform(0.5, 1.5, (3, c)),
    "class_bias": lambda rng, c: rng.normal(size=(3, c)), "map_scale": lambda rng, c: rng.normal(size=(N, H, c)),
    "map_bias": lambda rng, c: rng.normal(size=(N, H, c)), "style": lambda rng, c: rng.normal(3.0, 2.0, (N, 5, c)),
    "gate": lambda rng, c: rng.normal(size=(N, H, c)), "residual": lambda rng, c: rng.normal(size=(N, H, c)),
    "key": lambda rng, c: rng.normal(size=(N, H, c)),
    "kernel": lambda rng, c: rng.normal(size=(c, C)),
}  # fmt: skip


def arrays(state):
    """What of a state the papers carry, in their order."""
    if isinstance(state, jn.RunningStats):
        return state.mean, state.var
    if isinstance(state, jn.RunningCovariance):
        return state.mean, state.cov
    if isinstance(state, jn.SpectralState):
        return state.u, state.sigma
    return ()


def only(y):
    return y, None


def gain(p):
    return {name: p[name] for name in ("scale", "bias") if name in p}


MEAN, VAR = np.array([0.5, 1.0, 0.0, 2.0], np.float32), np.array([4.0, 1.0, 9.0, 0.5], np.float32)
RUNNING = jn.RunningStats(jnp.asarray(MEAN), jnp.asarray(VAR), jnp.asarray(9000), ("c",))
SETS = jn.RunningStats(jnp.stack([RUNNING.mean, RUNNING.var]), jnp.stack([RUNNING.var, RUNNING.var]), jnp.asarray(3),
                       ("set", "c"))  # fmt: skip
COVARIANCE = jn.RunningCovariance(
    RUNNING.mean, jnp.asarray([[[2.0, 0.5], [0.5, 1.0]], [[3.0, -1.0], [-1.0, 2.0]]]), jnp.asarray(5), ("c",)
)
DIRECTION = jn.SpectralState(jnp.asarray([0.5, 0.5, 0.5, -0.5]), jnp.asarray(1.0), ("o",))
REFERENCE = np.random.default_rng(9).normal(1.0, 2.0, (7, H, C)).astype(np.float32)
LABELS = np.array([2, 0, 1, 2])
HISTORY = jn.cross_iteration_history(jnp.zeros((C, C)), window=3)


def batch(function, *given, names=("scale", "bias"), **options):
    """A norm of (x, running, *given): `given` are parameters by name."""

    def ours(x, p, state, mask, over):
        values = [p[name] if isinstance(name, str) else name for name in given]
        kw = {name: p[name] for name in names}
        return function(x, state, *values, LAYOUT, over("n h"), mask=mask, **kw, **options)

    return ours


def paper_batch(function, *given, names=("scale", "bias"), **options):
    def paper(x, p, state, mask):
        values = [p[name] if isinstance(name, str) else name for name in given]
        return function(x, *state, *values, mask=mask, **{name: p[name] for name in names}, **options)

    return paper


def rows(function, *given, over=None, names=("scale", "bias"), **options):
    """A norm without state."""

    def ours(x, p, state, mask, add):
        values = [p[name] if isinstance(name, str) else name for name in given]
        kw = {name: p[name] for name in names} | ({} if mask is None else {"mask": mask})
        axes = () if over is None else (add(over),)
        return only(function(x, *values, LAYOUT, *axes, **kw, **options))

    return ours


def paper_rows(function, *given, names=("scale", "bias"), **options):
    def paper(x, p, state, mask):
        values = [p[name] if isinstance(name, str) else name for name in given]
        kw = {name: p[name] for name in names} | ({} if mask is None else {"mask": mask})
        return only(function(x, *values, **kw, **options))

    return paper


def kernels(function, names=("scale",), **options):
    def ours(x, p, state, mask, over):
        return only(function(x, "h i o", over("h i"), **{name: p[name] for name in names}, **options))

    return ours


def renorm_fixed(x, p, state, mask):
    """Ioffe 2017: r and d are constants to the gradient."""
    _, mean, var = papers.batch_stats(x, mask)
    s, old = np.sqrt(var + 1e-5), np.sqrt(state[1] + 1e-5)
    r_max, d_max = np.interp(9000, [5e3, 4e4], [1, 3]), np.interp(9000, [5e3, 2.5e4], [0, 5])
    r, d = np.clip(s / old, 1 / r_max, r_max), np.clip((mean - state[0]) / old, -d_max, d_max)

    def y(x, p):
        z = papers.batch_norm(x, *state, mask=mask)[0]
        return papers.affine(z * r + d, **gain(p))

    return y


def streaming_fixed(x, p, state, mask):
    _, new = papers.streaming_norm(x, *state, num_updates=9000, mask=mask)
    return lambda x, p: papers.affine(papers.standard(papers.clean(x, mask), *new, 1e-5), **gain(p))


def frozen_fixed(x, p, state, mask):
    return lambda x, _: papers.frozen_batch_norm(x, *state, **gain(p))


def spectral_fixed(x, p, state, mask):
    w = papers.wide(x).reshape(-1, C)
    u = papers.wide(state[0])
    v = w @ u / np.linalg.norm(w @ u)
    u = w.T @ v / np.linalg.norm(w.T @ v)
    return lambda x, p: x / (v @ x.reshape(-1, C) @ u)


def cross_iteration(x, p, state, mask, over):
    def dense(kernel, x):
        return jnp.einsum("nhi,io->nho", x.astype(kernel.dtype), kernel)

    options = {"scale": p["scale"], "bias": p["bias"], "mask": mask}
    return jn.cross_iteration_batch_norm(dense, p["kernel"], x, state, LAYOUT, over("n h"), **options)


def paper_cross_iteration(x, p, state, mask):
    x = papers.clean(x)
    y, _ = papers.cross_iteration_batch_norm(
        lambda kernel, x: np.einsum("nhi,io->nho", x, kernel), p["kernel"], x, [], window=3, mask=mask, **gain(p)
    )
    return y, ()


def gated(first):
    return rows(lambda x, gate, *a, **kw: jn.gated_rms_norm(x, gate, *a, gate_first=first, **kw), "gate", over="c",
                names=("scale",))  # fmt: skip


def qk(x, p, state, mask, over):
    query, key = jn.qk_norm(x, p["key"], LAYOUT, over("c"), query_scale=p["query_scale"], key_scale=p["key_scale"])
    return query.astype(key.dtype) + key, None


def paper_qk(x, p, state, mask):
    return sum(papers.qk_norm(x, p["key"], query_scale=p["query_scale"], key_scale=p["key_scale"])), None


def virtual(x, p, state, mask, over):
    reference = jn.moments(REFERENCE, LAYOUT, "n h")
    return only(jn.virtual_batch_norm(x, reference, LAYOUT, over("h"), mask=mask, **gain(p)))


def paper_virtual(x, p, state, mask):
    return only(papers.virtual_batch_norm(x, *papers.batch_stats(REFERENCE), mask=mask, **gain(p)))


def of_kernel(function):
    return lambda x, p, state, mask: only(function(x, **gain(p)))


def spectral(x, p, state, mask, over):
    return jn.spectral_norm(x, state, "h i o", "h i")


def film(x, p, state, mask, over):
    return only(jn.film(x, p["rows_scale"], p["rows_bias"], LAYOUT, scale_offset=1.0, mask=mask))


def adaptive_layer(x, p, state, mask, over):
    return only(jn.adaptive_layer_norm(x, p["rows_scale"], p["rows_bias"], LAYOUT, over("c"), mask=mask))


def conditional(x, p, state, mask, over):
    options = {"scale": p["class_scale"], "bias": p["class_bias"], "mask": mask}
    return jn.conditional_batch_norm(x, state, LABELS, LAYOUT, over("n h"), **options)


def positional(x, p, state, mask, over):
    return only(jn.positional_norm(x, LAYOUT, over("c"), mask=mask)[0])


def add_norm(x, p, state, mask, over):
    options = {"layout": LAYOUT, "over": over("c"), "mask": mask, **gain(p)}
    return only(jn.add_norm(x, p["residual"], jn.layer_norm, **options)[0])


GROUPS = {"names": ("scale", "bias", "channel_scale", "channel_bias")}
SWITCH = ("mean_logits", "var_logits")

CASES = [
    Case(
        "ghost batch", batch(jn.ghost_batch_norm, 2), paper_batch(papers.ghost_batch_norm, 2), state=RUNNING, sharded=1
    ),
    Case(
        "batch renorm", batch(jn.batch_renorm), paper_batch(papers.batch_renorm, num_updates=9000), state=RUNNING,
        sharded=0, constants=renorm_fixed,
    ),
    Case(
        "split batch", batch(jn.split_batch_norm, 1), paper_batch(papers.split_batch_norm, 1), state=SETS, sharded=0
    ),
    Case(
        "frozen batch", lambda x, p, state, mask, over: (jn.frozen_batch_norm(x, state, LAYOUT, **gain(p)), state),
        lambda x, p, state, mask: (papers.frozen_batch_norm(x, *state, **gain(p)), state),
        state=RUNNING, masks=False, constants=frozen_fixed,
    ),
    Case(
        "streaming", batch(jn.streaming_norm), paper_batch(papers.streaming_norm, num_updates=9000), state=RUNNING,
        sharded=0, constants=streaming_fixed,
    ),
    Case(
        "cross-iteration batch", cross_iteration, paper_cross_iteration, ("scale", "bias", "kernel"), HISTORY,
        sharded=0, close={"rtol": 2e-5, "atol": 2e-6},  # what counts of a channel deviates little, the rest a lot
    ),
    Case("virtual batch", virtual, paper_virtual, sharded=1),
    Case(
        "adaptive instance", rows(jn.adaptive_instance_norm, "style", over="h", names=()),
        paper_rows(papers.adaptive_instance_norm, "style", names=()), ("style",),
        sharded=1,
    ),
    Case(
        "adaptive layer", adaptive_layer,
        lambda x, p, state, mask: only(papers.adaptive_layer_norm(
            x, p["rows_scale"], p["rows_bias"], mask=mask)), ("rows_scale", "rows_bias"),
        sharded=2,
    ),
    Case(
        "FiLM", film,
        lambda x, p, state, mask: only(papers.film(
            papers.clean(x, mask), p["rows_scale"], p["rows_bias"], scale_offset=1.0)),
        ("rows_scale", "rows_bias"),
    ),
    Case(
        "conditional batch", conditional,
        lambda x, p, state, mask: papers.conditional_batch_norm(
            x, *state, LABELS, scale=p["class_scale"], bias=p["class_bias"], mask=mask),
        ("class_scale", "class_bias"), RUNNING,
    ),
    Case(
        "SPADE", batch(jn.spade, "map_scale", "map_bias", names=()),
        lambda x, p, state, mask: papers.spade(x, *state, p["map_scale"], p["map_bias"], mask=mask),
        ("map_scale", "map_bias"), RUNNING,
        sharded=0,
    ),
    Case(
        "partial RMS", rows(jn.partial_rms_norm, 0.6, over="c"), paper_rows(papers.partial_rms_norm, 0.6),
    ),
    Case(
        "scale", rows(jn.scale_norm, "one", over="c", names=()), paper_rows(papers.scale_norm, "one", names=()),
        ("one",), sharded=2,
    ),
    Case("L2", rows(jn.l2_norm, over="c"), paper_rows(papers.l2_norm), sharded=2),
    Case("QK", qk, paper_qk, ("key", "query_scale", "key_scale"), masks=False, rounded=2, sharded=2),
    Case(
        "gated RMS", gated(False), paper_rows(papers.gated_rms_norm, "gate", names=("scale",)), ("gate", "scale"),
        rounded=2,
        sharded=2,
    ),
    Case(
        "add and norm", add_norm,
        lambda x, p, state, mask: only(papers.add_norm(papers.clean(x, mask), p["residual"], mask=mask, **gain(p))[0]),
        ("residual", "scale", "bias"), rounded=2,
        sharded=2,
    ),
    Case(
        "positional", positional, lambda x, p, state, mask: only(papers.positional_norm(x, mask=mask)[0]), (),
        sharded=2,
    ),
    Case(
        "dynamic tanh", rows(jn.dynamic_tanh, "alpha"),
        lambda x, p, state, mask: only(papers.dynamic_tanh(papers.clean(x, mask), p["alpha"], **gain(p))),
        ("alpha", "scale", "bias"),
    ),
    Case(
        "dynamic erf", rows(jn.dynamic_erf, "alpha", "shift"),
        lambda x, p, state, mask: only(papers.dynamic_erf(papers.clean(x, mask), p["alpha"], p["shift"], **gain(p))),
        ("alpha", "shift", "scale", "bias"),
    ),
    Case(
        "global response", rows(jn.global_response_norm, over="h"), paper_rows(papers.global_response_norm), sharded=1
    ),
    Case(
        "filter response", rows(jn.filter_response_norm, "threshold", over="h"),
        paper_rows(papers.filter_response_norm, "threshold"), ("threshold", "scale", "bias"), sharded=1, rounded=2,
    ),
    Case(
        "local response", rows(jn.local_response_norm, 3, over="c", names=(), alpha=0.5),
        paper_rows(papers.local_response_norm, 3, names=(), alpha=0.5), (),
    ),
    Case(
        "EvoNorm B0", batch(jn.evo_norm_b0, names=("v", "scale", "bias")),
        paper_batch(papers.evo_norm_b0, names=("v", "scale", "bias")), ("v", "scale", "bias"), RUNNING, sharded=0,
    ),
    Case(
        "EvoNorm S0",
        lambda x, p, state, mask, over: only(jn.evo_norm_s0(x, 2, LAYOUT, v=p["v"], mask=mask, **gain(p))),
        paper_rows(papers.evo_norm_s0, 2, names=("v", "scale", "bias")), ("v", "scale", "bias"),
    ),
    Case(
        "switchable", batch(jn.switchable_norm, *SWITCH), paper_batch(papers.switchable_norm, *SWITCH),
        (*SWITCH, "scale", "bias"), RUNNING, sharded=0,
    ),
    Case(
        "batch-channel", batch(jn.batch_channel_norm, 2, **GROUPS), paper_batch(papers.batch_channel_norm, 2, **GROUPS),
        GROUPS["names"], RUNNING, sharded=0, rounded=3,
    ),
    Case(
        "decorrelated batch", batch(jn.decorrelated_batch_norm), paper_batch(papers.decorrelated_batch_norm),
        state=COVARIANCE, sharded=0,
    ),
    Case(
        "iterative", batch(jn.iterative_norm), paper_batch(papers.iterative_norm), state=COVARIANCE, sharded=0,
        close={"rtol": 1e-5, "atol": 1e-5},
    ),
    Case("weight", kernels(jn.weight_norm), of_kernel(papers.weight_norm), ("scale",), masks=False, sharded=1),
    Case(
        "weight standardization", kernels(jn.weight_standardization), of_kernel(papers.weight_standardization),
        ("scale",), masks=False, sharded=1,
    ),
    Case(
        "scaled weight standardization", kernels(jn.scaled_weight_standardization, gain=1.7),
        lambda x, p, state, mask: only(papers.scaled_weight_standardization(x, gain=1.7, **gain(p))), ("scale",),
        masks=False, sharded=1,
    ),
    Case(
        "spectral", spectral, lambda x, p, state, mask: papers.spectral_norm(x, state[0]), (), DIRECTION, masks=False,
        constants=spectral_fixed,
    ),
]  # fmt: skip
