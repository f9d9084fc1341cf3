"""Ten broken checkpoints and ten sound ones, of real small nets: what `jaxnorm doctor` must find, and must leave alone.

Each is written by the means of its library, and broken as in life. To keep them: python tests/broken.py DIR
"""

import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import flax.serialization
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from flax import nnx

import jaxnorm as jn
import jaxnorm.linen as jl
import jaxnorm.nnx as jx

RNG = np.random.default_rng(0)
WIDTH = 8
X = RNG.normal(1, 2, (32, WIDTH)).astype(np.float32)
Y = RNG.normal(0, 1, (32, WIDTH)).astype(np.float32)
MOMENTUM = 0.9


# --- the nets, trained


class Net(nn.Module):
    """Residual blocks with a batch norm, the scale of the last from 0; then layer norm."""

    momentum: float = MOMENTUM
    affine: bool = True
    norm: Any = jl.BatchNorm

    @nn.compact
    def __call__(self, x, train=True):
        for i in range(3):
            y = nn.relu(nn.Dense(WIDTH, name=f"dense_{i}")(x))
            scale = nn.initializers.zeros if i == 2 else nn.initializers.ones
            more = {"use_bias": self.affine, "use_scale": self.affine, "scale_init": scale}
            x = x + self.norm(momentum=self.momentum, name=f"bn_{i}", **more)(y, not train)
        return nn.Dense(WIDTH, name="head")(jl.LayerNorm(name="norm")(x))


def trained(net: Any = None, x=X, steps: int = 20, **options: Any) -> dict[str, Any]:
    """Variables after some steps of gradient descent: {"params", "batch_stats"} of NumPy arrays."""
    net = net or Net(**options)
    variables = net.init(jax.random.key(0), jnp.asarray(x))

    @jax.jit
    def step(variables, x):
        def loss(params):
            y, state = net.apply({**variables, "params": params}, x, mutable=["batch_stats"])
            return ((y - Y[: len(x)]) ** 2).mean(), state

        grads, state = jax.grad(loss, has_aux=True)(variables["params"])
        return {"params": jax.tree.map(lambda p, g: p - 0.1 * g, variables["params"], grads), **state}

    for _ in range(steps):
        variables = step(variables, jnp.asarray(x))
    return jax.tree.map(np.array, variables)


@functools.cache
def _once() -> dict[str, Any]:
    return trained()


def good() -> dict[str, Any]:
    """The trained net, to be broken."""
    return jax.tree.map(np.array, _once())


def nnx_net() -> Any:
    """The state of an nnx model whose statistics have seen twenty batches."""
    rngs = nnx.Rngs(0)
    norm = functools.partial(jx.BatchNorm, WIDTH, rngs=rngs, momentum=None)
    model = nnx.Sequential(nnx.Linear(WIDTH, WIDTH, rngs=rngs), norm(), nnx.relu, norm(), jx.RMSNorm(WIDTH, rngs=rngs))
    for _ in range(20):
        model(X)
    return nnx.state(model)


def haiku_net() -> dict[str, Any]:
    """Parameters and state of a Haiku net, in the tree of a training loop."""

    def forward(x):
        for _ in range(2):
            x = jax.nn.relu(hk.BatchNorm(True, True, 0.9)(hk.Linear(WIDTH)(x), is_training=True))
        return x

    net = hk.without_apply_rng(hk.transform_with_state(forward))
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        params, state = net.init(jax.random.key(0), X)
        for _ in range(3):
            _, state = net.apply(params, state, X)
    return {"params": params, "state": state}


def torch_like(updates: int) -> dict[str, np.ndarray]:
    """A state_dict, with torch's names, of the trained net."""
    out = {}
    for i, (name, stats) in enumerate(good()["batch_stats"].items()):
        params = good()["params"]
        out[f"layers.{2 * i}.weight"] = params[f"dense_{i}"]["kernel"].T
        out[f"layers.{2 * i + 1}.weight"], out[f"layers.{2 * i + 1}.bias"] = params[name]["scale"], params[name]["bias"]
        out[f"layers.{2 * i + 1}.running_mean"], out[f"layers.{2 * i + 1}.running_var"] = stats["mean"], stats["var"]
        out[f"layers.{2 * i + 1}.num_batches_tracked"] = np.array(updates)
    return out


# --- writing


def msgpack(path: Path, tree: Any) -> None:
    path.write_bytes(flax.serialization.to_bytes(tree))


def orbax(path: Path, tree: Any) -> None:
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path.absolute(), tree)


WRITE: dict[str, Callable[[Path, Any], None]] = {".msgpack": msgpack, "": orbax}


def write(path: Path, tree: Any) -> None:
    """By the suffix; .npz and .safetensors flat."""
    WRITE.get(path.suffix, jn.tools.write)(path, tree)


# --- broken


class Broken(NamedTuple):
    """A file, what is in it, the norms in which something is wrong, and what must be said of the first of them."""

    file: str
    make: Callable[[], Any]
    norms: tuple[str, ...]
    said: str
    flags: tuple[str, ...] = ()


ALL = ("bn_0", "bn_1", "bn_2")


def nan_batch():
    """One row that was not finite."""
    x = np.where(np.arange(32)[:, None] == 3, np.float32(np.nan), X)
    return {**good(), "batch_stats": trained(x=x, steps=1)["batch_stats"]}


def fast_variance():
    """E[x^2] - E[x]^2 in float32 of inputs far from 0."""
    tree, x = good(), X + np.float32(3e4)
    tree["batch_stats"]["bn_1"]["var"] = (x * x).mean(0) - x.mean(0) ** 2
    return tree


def one_layer_in_evaluation_mode():
    """use_running_average=True was left on in one of them."""
    tree = good()
    tree["batch_stats"]["bn_1"] = {"mean": np.zeros(WIDTH, np.float32), "var": np.ones(WIDTH, np.float32)}
    return tree


def state_thrown_away():
    """`params` came from the step, `batch_stats` from init."""
    return {"params": good()["params"], "batch_stats": trained(steps=0)["batch_stats"]}


def params_alone():
    return {"params": good()["params"]}


def renamed():
    """The module was given another name; its parameters were moved by hand, its statistics were not."""
    tree = good()
    tree["params"]["block"] = {"bn1": tree["params"].pop("bn_1")}
    return {"model": tree}


def batches_of_one():
    """Every variance is of one example: 0. Flax trains so without a word."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        return trained(x=X[:1], momentum=0.2, norm=nn.BatchNorm)


def not_synced():
    """Statistics of eight devices, each of its own rows."""
    tree, rows = good(), X.reshape(8, 4, WIDTH)
    stats = tree["batch_stats"]
    for one in stats.values():
        one["mean"] = one["mean"] + 0.1 * rows.mean(1)
        one["var"] = 0.9 * one["var"] + 0.1 * rows.var(1)
    return tree


def diverged():
    """A learning rate that is too large, in its last steps before NaN."""
    tree = torch_like(1000)
    tree["layers.3.running_var"] = tree["layers.3.running_var"] * np.float32(1e16)
    return tree


def too_few_updates():
    return torch_like(3)


BROKEN = [
    Broken("nan.msgpack", nan_batch, ALL, "8 of 8 entries of mean are NaN or infinite"),
    Broken("negative.npz", fast_variance, ("bn_1",), "of 8 variances are negative"),
    Broken("evaluation", one_layer_in_evaluation_mode, ("bn_1",), "never updated (mean 0, var 1), where bn_0"),
    Broken("thrown_away.safetensors", state_thrown_away, ALL, "was the new state thrown away?"),
    Broken("params.msgpack", params_alone, ALL, "were only the parameters saved?"),
    Broken("renamed", renamed, ("model/block/bn1", "model/bn_1"), "model/bn_1 has statistics without parameters"),
    Broken("of_one.npz", batches_of_one, ALL, "8 of 8 variances are below 1e-12"),
    Broken("replicas.msgpack", not_synced, ALL, "statistics of 8 replicas, up to"),
    Broken("diverged.safetensors", diverged, ("layers/3",), "diverged: means up to"),
    Broken(
        "few.npz", too_few_updates, ("layers/1", "layers/3", "layers/5"), "still 97% of the initial 0 and 1",
        ("--momentum", "0.99"),
    ),
]  # fmt: skip


# --- sound


def with_averages():
    """A training state: averaged parameters without statistics of their own, an optimizer's moments."""
    tree = good()
    mu = jax.tree.map(np.zeros_like, tree["params"])
    return {**tree, "ema_params": tree["params"], "opt_state": {"0": {"mu": mu}}, "step": np.array(20)}


def half_precision():
    """Parameters in bfloat16, statistics in float32."""
    tree = good()
    return {**tree, "params": jax.tree.map(lambda p: np.asarray(jnp.asarray(p, jnp.bfloat16)), tree["params"])}


def of_sets():
    """Two sets of statistics under one scale, on purpose; and a norm of rows whose scale is stored without its 1."""
    net = nn.Sequential([nn.Dense(WIDTH), SplitNorm(name="split"), jl.RMSNorm(scale_init=nn.initializers.zeros)])
    return trained(net, steps=3)


class SplitNorm(nn.Module):
    """Batch norm with sets, used in turn."""

    @nn.compact
    def __call__(self, x):
        norm = jl.SplitBatchNorm(momentum=MOMENTUM)
        return norm(x, which="clean", use_running_average=False) + norm(
            x, which="adversarial", use_running_average=False
        )


def pruned():
    """Some channels are dead, as in MobileNetV2: tiny scales, denormal variances."""
    tree = good()
    tree["params"]["bn_1"]["scale"][:3] *= np.float32(1e-4)
    tree["batch_stats"]["bn_1"]["var"][:3] = np.float32(5.6e-45)
    return tree


SOUND: dict[str, Callable[[], Any]] = {
    "linen.msgpack": good,
    "nested": lambda: {"model": good(), "config": {"width": np.array(WIDTH)}},
    "fresh.npz": lambda: trained(steps=0),
    "nnx.msgpack": lambda: nnx.to_pure_dict(nnx_net()),
    "nnx": nnx_net,  # orbax puts every variable into a box
    "torch.safetensors": lambda: torch_like(1000),
    "haiku.npz": haiku_net,
    "state.msgpack": with_averages,
    "without_affine": lambda: trained(affine=False),
    "half.safetensors": half_precision,
    "sets.msgpack": of_sets,
    "pruned.npz": pruned,
}

if __name__ == "__main__":
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    for broken in BROKEN:
        write(folder / broken.file, broken.make())
    for name, make in SOUND.items():
        write(folder / f"sound_{name}", make())
