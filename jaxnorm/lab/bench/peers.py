"""The norms of every framework as one kind of function, f(x, scale, bias) -> (y, state), all computing the same.

x has its channels last, scale and bias are float32, y has the dtype of x. Batch norm is in training mode and its state
is (mean, var), the running statistics after one step from 0 and 1; the others have (). RMS norm leaves bias alone.
Epsilon and momentum are the same for all. A framework's own layout and parameters are made inside f, so that its way
to them is timed as well.
"""

import os
from collections.abc import Callable
from importlib import import_module
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import jaxnorm as jn

GROUPS = 32
EPSILON = 1e-5
MOMENTUM = 0.9  # the part of the old running value that is kept

Norm = Callable[[Any, Any, Any], tuple[Any, tuple]]


def ours(norm: str, shape: tuple[int, ...], dtype: str) -> Norm:
    running = jn.running_stats(c=shape[-1])

    def batch(x, scale, bias):
        y, new = jn.batch_norm(x, running, scale=scale, bias=bias, momentum=MOMENTUM, epsilon=EPSILON)
        return y, (new.mean, new.var)

    return {
        "batch": batch,
        "layer": lambda x, s, b: (jn.layer_norm(x, scale=s, bias=b, epsilon=EPSILON), ()),
        "rms": lambda x, s, b: (jn.rms_norm(x, scale=s, epsilon=EPSILON), ()),
        "instance": lambda x, s, b: (jn.instance_norm(x, scale=s, bias=b, epsilon=EPSILON), ()),
        "group": lambda x, s, b: (jn.group_norm(x, GROUPS, scale=s, bias=b, epsilon=EPSILON), ()),
    }[norm]


def flax_linen(norm: str, shape: tuple[int, ...], dtype: str) -> Norm:
    import flax.linen as nn

    given: dict[str, Any] = {"epsilon": EPSILON, "dtype": dtype}
    module: Any = {
        "batch": lambda: nn.BatchNorm(use_running_average=False, momentum=MOMENTUM, **given),
        "layer": lambda: nn.LayerNorm(**given),
        "rms": lambda: nn.RMSNorm(**given),
        "instance": lambda: nn.InstanceNorm(**given),
        "group": lambda: nn.GroupNorm(num_groups=GROUPS, **given),
    }[norm]()
    stats = {"mean": jnp.zeros(shape[-1]), "var": jnp.ones(shape[-1])}

    def batch(x, scale, bias):
        variables = {"params": {"scale": scale, "bias": bias}, "batch_stats": stats}
        y, new = module.apply(variables, x, mutable=["batch_stats"])
        return y, (new["batch_stats"]["mean"], new["batch_stats"]["var"])

    def stateless(x, scale, bias):
        params = {"scale": scale} if norm == "rms" else {"scale": scale, "bias": bias}
        return module.apply({"params": params}, x), ()

    return batch if norm == "batch" else stateless


def flax_nnx(norm: str, shape: tuple[int, ...], dtype: str) -> Norm:
    from flax import nnx

    given: dict[str, Any] = {"epsilon": EPSILON, "dtype": dtype, "rngs": nnx.Rngs(0)}
    module: Any = {
        "batch": lambda: nnx.BatchNorm(shape[-1], use_running_average=False, momentum=MOMENTUM, **given),
        "layer": lambda: nnx.LayerNorm(shape[-1], **given),
        "rms": lambda: nnx.RMSNorm(shape[-1], **given),
        "instance": lambda: nnx.InstanceNorm(shape[-1], **given),
        "group": lambda: nnx.GroupNorm(shape[-1], num_groups=GROUPS, **given),
    }[norm]()
    parts = nnx.split(module)

    def f(x, scale, bias):
        module: Any = nnx.merge(*parts, copy=True)
        module.scale = nnx.Param(scale)
        if norm != "rms":
            module.bias = nnx.Param(bias)
        y = module(x)
        return y, (module.mean[...], module.var[...]) if norm == "batch" else ()

    return f


def haiku(norm: str, shape: tuple[int, ...], dtype: str) -> Norm:
    """Its parameters have the dtype of x and a shape of its own, its running statistics are debiased."""
    hk: Any = import_module("haiku")

    both: dict[str, Any] = {"create_scale": True, "create_offset": True}
    last = {"data_format": "channels_last"}
    make = {
        "batch": lambda: hk.BatchNorm(decay_rate=MOMENTUM, eps=EPSILON, **both, **last),
        "layer": lambda: hk.LayerNorm(-1, eps=EPSILON, param_axis=-1, **both),
        "rms": lambda: hk.RMSNorm(-1, eps=EPSILON, param_axis=-1),
        "instance": lambda: hk.InstanceNorm(eps=EPSILON, **both, **last),
        "group": lambda: hk.GroupNorm(GROUPS, eps=EPSILON, **both, **last),
    }[norm]
    module = hk.transform_with_state(lambda x: make()(x, True) if norm == "batch" else make()(x))
    params, state = module.init(jax.random.key(0), jnp.zeros((1, *shape[1:]), dtype))

    def f(x, scale, bias):
        values = {"scale": scale, "offset": bias}
        given = {
            name: {key: values[key].astype(leaf.dtype).reshape(leaf.shape) for key, leaf in leaves.items()}
            for name, leaves in params.items()
        }
        y, new = module.apply(given, state, None, x)
        return y, tuple(new[f"batch_norm/~/{key}_ema"]["average"] for key in ("mean", "var")) if norm == "batch" else ()

    return f


def equinox(norm: str, shape: tuple[int, ...], dtype: str) -> Norm:
    """Its modules take one example with the channels first, under vmap. It calls groups of one channel instance norm.

    Batch, layer and RMS norm go over the rows of x, which asks for no transposed copy.
    """
    eqx: Any = import_module("equinox")

    c = shape[-1]
    state = None
    if norm == "batch":
        make = eqx.nn.make_with_state(eqx.nn.BatchNorm)
        module, state = make(c, axis_name="rows", eps=EPSILON, momentum=MOMENTUM, mode="batch")
    elif norm == "layer":
        module = eqx.nn.LayerNorm(c, eps=EPSILON)
    elif norm == "rms":
        module = eqx.nn.RMSNorm(c, eps=EPSILON, use_bias=False)
    else:
        module = eqx.nn.GroupNorm(c if norm == "instance" else GROUPS, c, eps=EPSILON)

    def f(x, scale, bias):
        if norm == "rms":
            given: Any = eqx.tree_at(lambda m: m.weight, module, scale)
        else:
            given = eqx.tree_at(lambda m: (m.weight, m.bias), module, (scale, bias))
        if norm in ("instance", "group"):
            y = jnp.moveaxis(jax.vmap(given)(jnp.moveaxis(x, -1, 1)), 1, -1)
            return y.astype(x.dtype), ()
        rows = x.reshape(-1, c)
        if norm != "batch":
            return jax.vmap(given)(rows).reshape(x.shape).astype(x.dtype), ()
        y, new = jax.vmap(given, in_axes=(0, None), out_axes=(0, None), axis_name="rows")(rows, state)
        return y.reshape(x.shape).astype(x.dtype), new.get(given.batch_state_index)

    return f


def keras(norm: str, shape: tuple[int, ...], dtype: str) -> Norm:
    """On JAX, float32 variables, computing in the dtype of x."""
    keras: Any = import_module("keras")

    layers = keras.layers
    given: dict[str, Any] = {"epsilon": EPSILON, "dtype": "mixed_bfloat16" if dtype == "bfloat16" else dtype}
    layer = {
        "batch": lambda: layers.BatchNormalization(momentum=MOMENTUM, **given),
        "layer": lambda: layers.LayerNormalization(**given),
        "rms": lambda: layers.RMSNormalization(**given),
        "instance": lambda: layers.GroupNormalization(groups=-1, **given),  # its name for it
        "group": lambda: layers.GroupNormalization(groups=GROUPS, **given),
    }[norm]()
    layer.build(shape)
    state = [variable.value for variable in layer.non_trainable_variables]

    def f(x, scale, bias):
        training = {"training": True} if norm == "batch" else {}
        y, new = layer.stateless_call([scale] if norm == "rms" else [scale, bias], state, x, **training)
        return y, tuple(new)

    return f


def torch(norm: str, shape: tuple[int, ...], dtype: str) -> Norm:
    """Channels last is a memory format here: the movedim copy nothing. Parameters in the dtype of x but in batch norm.

    Its running variance has Bessel's correction.
    """
    torch: Any = import_module("torch")
    F = torch.nn.functional

    state = (torch.zeros(shape[-1], device=torch_device()), torch.ones(shape[-1], device=torch_device()))

    def batch(x, s, b):
        return F.batch_norm(x.movedim(-1, 1), *state, s, b, True, 1 - MOMENTUM, EPSILON).movedim(1, -1), state

    def like(x, *params):
        return [p.to(x.dtype) for p in params]

    return {
        "batch": batch,
        "layer": lambda x, s, b: (F.layer_norm(x, shape[-1:], *like(x, s, b), EPSILON), ()),
        "rms": lambda x, s, b: (F.rms_norm(x, shape[-1:], *like(x, s), EPSILON), ()),
        "instance": lambda x, s, b: (
            F.instance_norm(x.movedim(-1, 1), weight=like(x, s)[0], bias=like(x, b)[0], eps=EPSILON).movedim(1, -1),
            (),
        ),
        "group": lambda x, s, b: (F.group_norm(x.movedim(-1, 1), GROUPS, *like(x, s, b), EPSILON).movedim(1, -1), ()),
    }[norm]


def torch_device() -> str:
    return {"cpu": "cpu", "gpu": "cuda"}[jax.default_backend()]


PACKAGES = {"haiku": "dm-haiku"}  # where the distribution is named otherwise than the module
BUILD: dict[str, Callable[[str, tuple[int, ...], str], Norm]] = {
    "jaxnorm": ours,
    "flax.linen": flax_linen,
    "flax.nnx": flax_nnx,
    "haiku": haiku,
    "equinox": equinox,
    "keras": keras,
    "torch": torch,
}


def left_out(names: tuple[str, ...]) -> dict[str, str]:
    """Which of the frameworks cannot be measured here, and why."""
    os.environ.setdefault("KERAS_BACKEND", "jax")  # read when keras is imported
    reasons = {}
    for name in names:
        try:
            module: Any = import_module(name)
        except ImportError as error:
            missing = isinstance(error, ModuleNotFoundError) and error.name == name
            reasons[name] = "not installed" if missing else f"does not import: {error}"
            continue
        if name == "keras" and module.config.backend() != "jax":
            reasons[name] = f"runs on {module.config.backend()}, not on JAX"
        if name == "torch":
            platform = jax.default_backend()
            if platform not in ("cpu", "gpu") or (platform == "gpu" and not module.cuda.is_available()):
                reasons[name] = f"this torch has no {platform}"
    return reasons


class Calls(NamedTuple):
    """What is timed. `wait` returns when the result of a call is there."""

    forward: Callable[[], Any]  # (y, state)
    backward: Callable[[], Any]  # (y, state, gradients of x, scale and bias): forward and backward
    wait: Callable[[Any], Any]


def calls(peer: str, norm: str, arrays: tuple[jax.Array, ...], jit: bool = True) -> Calls:
    """A peer's norm of `arrays`: x, scale, bias, and g, the gradient of y."""
    x, scale, bias, g = arrays
    f = BUILD[peer](norm, x.shape, str(x.dtype))
    if peer == "torch":
        return torch_calls(f, arrays)

    def both(x, scale, bias, g):
        y, pull, state = jax.vjp(f, x, scale, bias, has_aux=True)
        return y, state, pull(g)

    forward, backward = (jax.jit(f), jax.jit(both)) if jit else (f, both)
    return Calls(lambda: forward(x, scale, bias), lambda: backward(x, scale, bias, g), jax.block_until_ready)


def torch_calls(f: Norm, arrays: tuple[jax.Array, ...]) -> Calls:
    """With torch's own autograd. Nothing is kept for a backward pass where there is none, as in JAX."""
    torch: Any = import_module("torch")

    torch.set_num_threads(cores())
    device = torch_device()

    def tensor(z: jax.Array) -> Any:
        wide = torch.from_numpy(np.array(z.astype(jnp.float32)))
        return wide.to(device, getattr(torch, str(z.dtype)))

    *inputs, g = map(tensor, arrays)
    leaves = [z.detach().requires_grad_() for z in inputs]

    def forward():
        with torch.no_grad():
            return f(*inputs)

    def backward():
        y, state = f(*leaves)
        return y.detach(), state, torch.autograd.grad(y, leaves, g, allow_unused=True, materialize_grads=True)

    return Calls(forward, backward, (lambda _: None) if device == "cpu" else (lambda _: torch.cuda.synchronize()))


def cores() -> int:
    """Of this process, which may have fewer than the machine."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
