"""A model taken apart into layers of named arrays, alike for every framework, and put together again."""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

import jax
import numpy as np

from jaxnorm.errors import ArgumentError
from jaxnorm.tools import files
from jaxnorm.tools.files import Settings
from jaxnorm.tools.files_keras import keras_settings
from jaxnorm.tools.find import OPTIMIZERS, find_norms, is_variable, natural, optimizer_of, place, put
from jaxnorm.tools.settings import WORDS

FRAMEWORKS = ("flax", "torch", "keras", "haiku", "equinox", "onnx")
# The names that tell whose a tree is, after find.place, and those that a framework shares with Flax.
SIGNS = {
    "torch": {"weight", "running_mean", "running_var", "num_batches_tracked"},
    "haiku": {"w", "b", "offset", "mean_hidden", "var_hidden", "var_counter"},
    "keras": {"gamma", "beta", "moving_mean", "moving_variance", "embeddings"},
    "flax": {"kernel", "embedding", "scale", "mean", "var", "num_updates"},
}
SHARED = {"keras": {"kernel", "scale"}, "haiku": {"scale", "mean", "var", "num_updates", "embeddings"}, "torch": set()}
KERNELS = {"weight": "kernel", "w": "kernel", "kernel": "kernel", "b": "bias"}
KERNELS |= {"embeddings": "embedding", "depthwise_kernel": "kernel"}
INSIDE = ("state_dict", "model_state_dict", "model")  # where a training checkpoint keeps its model
# An average from zero that is divided by 1 - momentum^t: what a source without t continues as. 0.999999^t is 0.
MANY = 2**30


@dataclass(frozen=True)
class Layer:
    """Arrays that belong together.

    path: `block/conv`.
    kind: that of a NormLayer ("batch", "scale and bias", "scale", ...), "kernel", or "other".
    leaves: scale, bias, mean, var, num_updates, kernel, embedding, or a name of its own.
    own: what the framework calls them.
    """

    path: str
    kind: str
    leaves: dict[str, Any]
    own: dict[str, str]

    @property
    def norm(self) -> bool:
        """Whether it is a norm."""
        return self.kind not in ("kernel", "other")


@dataclass(frozen=True)
class Model:
    """Layers by path, what they say of themselves, and how to make the whole of new values.

    settings: by path: momentum, epsilon, unbiased and debias of a norm, and whether it is torch's InstanceNorm, and
        whether a kernel is of a transposed Conv.
    note: what of the whole is not the model.
    """

    framework: str
    layers: dict[str, Layer]
    settings: Settings = field(default_factory=dict)
    rebuild: Callable[[Mapping[tuple[str, str], np.ndarray]], Any] = lambda _: None
    note: str = ""


def take_apart(thing: Any, framework: str | None = None, *, role: str = "source") -> Model:
    """A file, a model or a tree as layers. `framework` says whose it is; otherwise its type or its names must."""
    if isinstance(thing, Model):
        return thing
    if framework is not None and framework not in FRAMEWORKS:
        raise ArgumentError(f"there is no framework {framework!r}: {', '.join(FRAMEWORKS)}.")
    settings: Settings = {}
    if isinstance(thing, str | os.PathLike):
        checkpoint = files.load(thing)
        thing, settings, framework = checkpoint.tree, checkpoint.settings, framework or checkpoint.framework
    home = {base.__module__.split(".")[0] for base in type(thing).__mro__}
    if "torch" in home and hasattr(thing, "state_dict"):
        return _of_tree(thing.state_dict(), "torch", _torch_settings(thing), role)
    if "keras" in home and hasattr(thing, "weights"):
        return _of_keras(thing, role)
    parts = thing if isinstance(thing, tuple) else (thing,)
    if any(base.__module__.startswith("equinox.") for base in type(parts[0]).__mro__):
        return _of_equinox(parts, role)
    if "flax" in home and isinstance(thing, import_module("flax.nnx").Module):
        settings = _nnx_settings(thing)
    return _of_tree(thing, framework, settings, role)


def _of_tree(tree: Any, framework: str | None, settings: Settings, role: str) -> Model:
    passed = {optimizer_of(path): None for path, _ in jax.tree_util.tree_flatten_with_path(tree)[0] if path}
    inside = _inside(tree) if role == "source" else None
    note = ""
    if inside:
        passed |= {key: None for key, part in tree.items() if key != inside and _ranks(part)}
        tree, note = tree[inside], f", of {inside!r}"
    names = ", ".join(repr(name) for name in passed if name)
    note += f", without {names}" if names else ""
    groups: dict[str, dict[str, tuple[Any, Any]]] = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        if path and hasattr(leaf, "shape") and hasattr(leaf, "dtype"):
            words, name = place(path)
            if isinstance(tree, list):
                words = (str(path[0].idx), *words)
            if not optimizer_of(path):
                groups.setdefault("/".join(words), {})[name] = path, leaf
    groups = {
        path: group for path, group in groups.items()
        if not any("key<" in str(leaf.dtype) for _, leaf in group.values())  # nnx keeps its random streams in the state
    }  # fmt: skip
    if not groups:
        raise ArgumentError(f"the {role} holds no arrays: {type(tree).__name__}{note}.")
    framework = framework or recognised({name: f"{path}/{name}" for path, g in groups.items() for name in g}, role)
    norms = {norm.path: norm for norm in find_norms(tree)}
    layers, keys = {}, {}
    for path, group in groups.items():
        if path in norms:
            paths = {at: name for name, at in norms[path].leaves.items()}
            own = {paths.get(at, name): name for name, (at, _) in group.items()}
        else:
            own = {KERNELS.get(name, name): name for name in group}
        if len(own) < len(group):
            raise ArgumentError(f"two of {', '.join(group)} of {path!r} in the {role} would be one variable.")
        leaves = {name: group[mine][1] for name, mine in own.items()}
        kind = norms[path].kind if path in norms else "kernel" if leaves.keys() & {"kernel", "embedding"} else "other"
        layers[path] = Layer(path, kind, leaves, own)
        keys |= {(path, name): group[mine][0] for name, mine in own.items()}

    def rebuild(values: Mapping[tuple[str, str], np.ndarray]) -> Any:
        made = {keys[at]: like(layers[at[0]].leaves[at[1]], value) for at, value in values.items()}
        return put(tree, made)

    ordered = isinstance(tree, Mapping) and all(hasattr(leaf, "shape") for leaf in tree.values())
    if ordered:  # a flat dict: jax sorts the keys of a dict, its own order is that of the model
        first = {".".join(place((jax.tree_util.DictKey(key),))[0]).replace(".", "/"): None for key in tree}
        layers = {path: layers[path] for path in first if path in layers}
    else:
        layers = {path: layers[path] for path in sorted(layers, key=natural)}
    return Model(framework, layers, settings, rebuild, note)


def _inside(tree: Any) -> str | None:
    """Under which name a checkpoint has its model, beside an optimizer's state and numbers such as the epoch."""
    for name in INSIDE:
        if isinstance(tree, Mapping) and isinstance(tree.get(name), Mapping):
            ranks = _ranks({key: part for key, part in tree.items() if key != name and key not in OPTIMIZERS})
            # "model" may be a layer's name too, and a scalar beside it a parameter
            sure = name != "model" or tree.keys() & OPTIMIZERS or (len(tree) > 1 and not ranks)
            if sure and not any(ranks):
                return name
    return None


def _ranks(tree: Any) -> list[int]:
    """Of the arrays in a tree."""
    return [leaf.ndim for leaf in jax.tree.leaves(tree) if hasattr(leaf, "ndim")]


def recognised(names: Mapping[str, str], role: str) -> str:
    """Whose names these are: {name: an example of where it stands}."""
    fits = [
        framework for framework, signs in SIGNS.items()
        if names.keys() & signs
        and not names.keys() & set().union(*SIGNS.values()) - signs - SHARED.get(framework, set())
    ]  # fmt: skip
    if len(fits) == 1:
        return fits[0]
    what = ", ".join(sorted(names.values())[:6])
    raise ArgumentError(
        f"whose the {role} is cannot be told from its names ({what}). Give "
        f"{'framework' if role == 'source' else 'target_framework'}= one of {', '.join(FRAMEWORKS)}."
    )


def like(leaf: Any, value: np.ndarray) -> Any:
    """A value as the template's leaf is: torch's, NumPy's or JAX's, and as it is sharded."""
    if type(leaf).__module__.startswith("torch"):
        return files.tensor(value)
    sharding = getattr(leaf, "sharding", None)
    if sharding is not None and len(sharding.device_set) > 1:
        return jax.device_put(value, sharding)
    return jax.numpy.asarray(value) if isinstance(leaf, jax.Array) else np.array(value)


def dtype_of(leaf: Any) -> np.dtype:
    """NumPy's dtype of a leaf of any library."""
    return files.array(leaf[:0] if leaf.ndim else leaf).dtype if _torch(leaf) else np.dtype(leaf.dtype)


def _torch(leaf: Any) -> bool:
    return type(leaf).__module__.startswith("torch")


def _torch_settings(module: Any) -> Settings:
    """What the layers of an nn.Module say of themselves."""
    torch: Any = import_module("torch")
    out: Settings = {}
    for name, layer in module.named_modules():
        said = out[name.replace(".", "/")] = {}
        if hasattr(layer, "eps"):
            said["epsilon"] = torch.finfo(torch.float32).eps if layer.eps is None else layer.eps
        if hasattr(layer, "momentum"):
            kept = None if layer.momentum is None else 1 - layer.momentum
            said |= {"momentum": kept, "unbiased": True, "debias": False}
        if isinstance(layer, torch.nn.modules.conv._ConvTransposeNd):
            said["transposed"] = True
        if isinstance(layer, torch.nn.modules.instancenorm._InstanceNorm):
            said["instance"] = True
    return out


def _nnx_settings(module: Any) -> Settings:
    """What the modules that hold an nnx model's variables say of themselves. A shared one lies at several paths."""
    out: Settings = {}
    for path, _ in jax.tree_util.tree_flatten_with_path(module)[0]:
        layer = module
        for key in path:
            at = getattr(key, "name", None)
            part = getattr(layer, at) if at else layer[key.idx if hasattr(key, "idx") else key.key]
            if is_variable(part):
                break
            layer = part
        said = {word: getattr(layer, word) for word in WORDS if hasattr(layer, word)}
        if "momentum" in said:
            said = {"unbiased": False, "debias": False, **said}
        if type(layer).__name__ == "ConvTranspose":
            said["transposed"] = True
        out["/".join(place(path)[0])] = said
    return out


def _of_keras(model: Any, role: str) -> Model:
    """A Keras model: its variables have paths. A Sequential puts its own name before those of the layers it builds."""
    own = f"{model.name}/" if type(model).__name__ == "Sequential" else ""
    full = {v.path.removeprefix(own): v.path for v in model.weights if "seed_generator" not in v.path}
    tree = {v.path.removeprefix(own): v.value for v in model.weights if v.path.removeprefix(own) in full}
    settings: Settings = {}
    for layer in model._flatten_layers():
        if layer.weights:
            path = layer.weights[0].path.removeprefix(own).rpartition("/")[0]
            settings[path] = keras_settings(type(layer).__name__, vars(layer)) or settings.get(path, {})
    made = _of_tree(tree, "keras", settings, role)

    def rebuild(values: Mapping[tuple[str, str], np.ndarray]) -> Any:
        return {full[path]: value for path, value in made.rebuild(values).items()}

    return Model("keras", made.layers, settings, rebuild)


def _of_equinox(parts: tuple[Any, ...], role: str) -> Model:
    """An Equinox model, or (model, state): batch norm's statistics lie in the state, under indices that it holds."""
    from equinox.nn import BatchNorm, ConvTranspose

    model, state = parts[0], parts[1] if len(parts) > 1 else None
    made = _of_tree(model, "equinox", {}, role)
    layers, settings, norms = dict(made.layers), {}, {}

    def speaks(part: Any) -> bool:
        return hasattr(part, "eps") or isinstance(part, ConvTranspose)

    for at, layer in jax.tree_util.tree_flatten_with_path(model, is_leaf=speaks)[0]:
        if not speaks(layer):
            continue
        path = "/".join(place((*at, jax.tree_util.GetAttrKey("weight")))[0])
        settings[path] = {"epsilon": float(layer.eps)} if hasattr(layer, "eps") else {"transposed": True}
        if not isinstance(layer, BatchNorm):
            continue
        if state is None:
            raise ArgumentError(f"{path!r} keeps its statistics in Equinox's state. Give (model, state).")
        batch = layer.mode == "batch"
        settings[path] |= {"momentum": float(layer.momentum), "unbiased": False, "debias": batch}
        norms[path] = layer
        mean, var = state.get(layer.batch_state_index if batch else layer.ema_state_index)
        leaves = {"mean": mean, "var": var}
        if batch:
            count = state.get(layer.batch_counter)
            scale = 1 - float(layer.momentum) ** int(count) if int(count) else 1.0
            leaves = {"mean": np.asarray(mean) / np.float32(scale), "var": np.asarray(var) / np.float32(scale)}
            leaves["num_updates"] = count
        elif role == "source" and bool(state.get(layer.ema_first_time_index)):
            raise ArgumentError(f"{path!r} has seen no batch: Equinox has not set its statistics yet.")
        old = layers.get(path, Layer(path, "batch", {}, {}))
        layers[path] = Layer(path, "batch", {**old.leaves, **leaves}, {**old.own, **{name: name for name in leaves}})

    def rebuild(values: Mapping[tuple[str, str], np.ndarray]) -> Any:
        statistics = {at: value for at, value in values.items() if at[0] in norms and at[1] not in ("scale", "bias")}
        new = made.rebuild({at: value for at, value in values.items() if at not in statistics})
        if state is None:
            return new
        leaves, treedef = jax.tree_util.tree_flatten(state)
        after = jax.tree_util.tree_unflatten(treedef, leaves)  # State.set spends the one that it is called on
        for path, layer in norms.items():
            if (path, "mean") not in statistics:
                continue
            pair = [statistics[path, name] for name in ("mean", "var")]
            if layer.mode == "batch":
                count = int(statistics[path, "num_updates"])
                scale = np.float32(1 - float(layer.momentum) ** count if count else 1.0)
                after = after.set(layer.batch_counter, state.get(layer.batch_counter) * 0 + count)  # of its type
                after = after.set(layer.batch_state_index, tuple(jax.numpy.asarray(z * scale) for z in pair))
            else:
                after = after.set(layer.ema_first_time_index, jax.numpy.asarray(False))
                after = after.set(layer.ema_state_index, tuple(map(jax.numpy.asarray, pair)))
        return new, after

    return Model("equinox", layers, settings, rebuild)
