"""Keras files: which array is gamma and which beta, and the settings of the norms.

`.h5` names its arrays. `.keras` and `.weights.h5` number them, in the order in which the layer made them: which ones a
layer has is in the config, which `.weights.h5` lacks. Without it the shapes must leave one reading only.
"""

import io
import json
import re
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from jaxnorm.errors import ArgumentError
from jaxnorm.tools.files import Settings, need

ARRAYS = ["gamma", "beta", "moving_mean", "moving_variance"]
Config = tuple[str, dict[str, Any]]


def keras_file(path: Path) -> tuple[dict[str, np.ndarray], str | None, Settings]:
    """A flat dict of `layer/gamma`, "keras" (None for another HDF5 file), and what the layers say."""
    h5py = need("h5py", "h5py")
    if path.suffix == ".keras":
        with zipfile.ZipFile(path) as archive:
            configs = _configs(json.loads(archive.read("config.json")))
            with h5py.File(io.BytesIO(archive.read("model.weights.h5")), "r") as file:
                return _numbered(file, configs), "keras", _settings(configs)
    with h5py.File(path, "r") as file:
        if "model_weights" in file or "layer_names" in file.attrs:
            text = file.attrs.get("model_config")
            config = json.loads(text) if text else {}
            return _named(file.get("model_weights", file), config), "keras", _settings(_configs(config))
        if "layers" in file or "vars" in file:
            return _numbered(file, {}), "keras", {}
        found: dict[str, np.ndarray] = {}
        file.visititems(lambda name, item: found.update({name: item[()]}) if isinstance(item, h5py.Dataset) else None)
        return found, None, {}


def _named(group: Any, config: dict[str, Any]) -> dict[str, np.ndarray]:
    """The older format: each layer lists the names of its weights. A Sequential puts its own name before them."""
    own = f"{config['config']['name']}/" if config.get("class_name") == "Sequential" else ""
    out = {}
    for layer in group.values():
        for name in layer.attrs["weight_names"]:
            name = name.decode() if isinstance(name, bytes) else str(name)
            out[name.removeprefix(own).split(":")[0]] = layer[name][()]
    return {name: value for name, value in out.items() if "seed_generator" not in name}


def _numbered(file: Any, configs: dict[str, Config]) -> dict[str, np.ndarray]:
    """The newer format: a group a layer, named after its class or its attribute, with its own name beside it."""
    out: dict[str, np.ndarray] = {}

    def walk(group: Any, path: str, key: str) -> None:
        if "vars" in group:
            values = [group["vars"][str(i)][()] for i in range(len(group["vars"]))]
            for name, value in zip(_names(path, key, configs.get(path), values), values, strict=True):
                out[f"{path}/{name}"] = value
        for inner, child in group.items():
            if inner in ("vars", "seed_generator") or (not path and inner == "optimizer"):
                continue
            if "vars" not in child:  # a container: layers, or a list of them
                walk(child, path, inner)
            else:
                name = child["vars"].attrs.get("name", inner)
                walk(child, f"{path}/{name}".strip("/"), inner)

    walk(file, "", "")
    return out


def _names(path: str, key: str, config: Config | None, values: list[np.ndarray]) -> list[str]:
    """What the arrays of one layer are called."""
    kind, said = config or (_class(key), {})
    shapes = [value.shape for value in values]
    if config and kind in ("BatchNormalization", "LayerNormalization", "GroupNormalization"):
        rms = said.get("rms_scaling", False)
        names = ["gamma"] if rms or said.get("scale", True) else []
        names += ["beta"] if said.get("center", True) and not rms else []
        names += ARRAYS[2:] if kind == "BatchNormalization" else []
    elif kind == "RMSNormalization":
        names = ["scale"]
    elif kind == "Embedding":
        names = ["embeddings"]
    elif len({*shapes}) == 1 and len(shapes[0]) == 1 and len(shapes) in (1, 2, 3, 4):
        if len(shapes) == 4:
            names = ARRAYS
        elif len(shapes) == 2 and kind in ("LayerNormalization", "GroupNormalization"):
            names = ARRAYS[:2]
        else:
            raise ArgumentError(
                f"layer {path!r} has {len(shapes)} vectors without names: they could be gamma, beta or moving "
                "statistics. Give the .keras file, whose config says it, or the Keras model."
            )
    elif shapes and len(shapes[0]) > 1 and all(shape == shapes[0][-1:] for shape in shapes[1:]) and len(shapes) < 3:
        names = ["kernel", "bias"][: len(shapes)]
    elif len(shapes) == 2 and (kind.startswith("Depthwise") or kind.endswith("Transpose")):
        names = ["kernel", "bias"]  # whose outputs are not the kernel's last axis
    else:
        names = [f"vars_{i}" for i in range(len(shapes))]
    if len(names) != len(values):
        raise ArgumentError(f"layer {path!r} ({kind}) has {len(values)} arrays, its config says {names}.")
    return names


def _class(key: str) -> str:
    """BatchNormalization of batch_normalization_2."""
    words = re.sub(r"_\d+$", "", key).split("_")
    return "".join("RMS" if word == "rms" else word.capitalize() for word in words)


def _configs(model: dict[str, Any]) -> dict[str, Config]:
    """Class and config of every layer that the model's config lists, by the names on the way to it."""
    out: dict[str, Config] = {}

    def walk(entry: Any, path: str) -> None:
        config = entry.get("config", {})
        for layer in config.get("layers", []) if isinstance(config, dict) else []:
            name = layer.get("name") or layer.get("config", {}).get("name")
            if name:  # a class of the user's may write none
                inner = f"{path}/{name}".strip("/")
                out[inner] = layer["class_name"], layer["config"]
                walk(layer, inner)

    walk(model, "")
    return out


def _settings(configs: dict[str, Config]) -> Settings:
    return {path: keras_settings(*config) for path, config in configs.items()}


def keras_settings(kind: str, config: dict[str, Any]) -> dict[str, Any]:
    """What a layer says of itself, in our words."""
    settings: dict[str, Any] = {"transposed": True} if kind.endswith("Transpose") else {}
    if "epsilon" in config:
        settings["epsilon"] = config["epsilon"]
        if "momentum" in config:
            settings |= {"momentum": config["momentum"], "unbiased": False, "debias": False}
    return settings
