"""ONNX files: the initializers that nodes of known kinds use, one layer a node, in torch's names and layouts."""

from pathlib import Path
from typing import Any

import numpy as np

from jaxnorm.errors import ArgumentError
from jaxnorm.tools.files import Settings, need

# The inputs after x, and the defaults of epsilon and of momentum, which is the part kept.
NORMS = {
    "BatchNormalization": (["weight", "bias", "running_mean", "running_var"], 1e-5, 0.9),
    "InstanceNormalization": (["weight", "bias"], 1e-5, None),
    "GroupNormalization": (["weight", "bias"], 1e-5, None),
    "LayerNormalization": (["weight", "bias"], 1e-5, None),
    "RMSNormalization": (["weight"], 1e-5, None),
}
LAYERS = ["Conv", "ConvTranspose", "Gemm", "MatMul"]


def onnx_file(path: Path) -> tuple[dict[str, np.ndarray], str, Settings]:
    """A flat dict of `layer.weight`, "onnx", and the settings by layer."""
    onnx = need("onnx", "onnx")
    model = onnx.load(path)
    if not model.HasField("graph"):
        raise ArgumentError("it holds no graph.")
    graph = model.graph
    arrays = {item.name: onnx.numpy_helper.to_array(item) for item in graph.initializer}
    for node in graph.node:
        if node.op_type == "Constant":
            arrays[node.output[0]] = onnx.numpy_helper.to_array(_attributes(onnx, node)["value"])
    used: set[str] = set()
    out: dict[str, np.ndarray] = {}
    settings: Settings = {}
    bias_of = _biases(graph, arrays)
    for index, node in enumerate(graph.node):
        said = _attributes(onnx, node)
        names = NORMS[node.op_type][0] if node.op_type in NORMS else ["weight", "bias"]
        if node.op_type not in (*NORMS, *LAYERS):
            continue
        found = dict(zip(names, node.input[1:], strict=False))
        if node.op_type == "MatMul" and node.output[0] in bias_of:
            found["bias"] = bias_of[node.output[0]]
        found = {name: key for name, key in found.items() if key in arrays}
        if "weight" not in found:
            continue  # a product of two activations, or a norm of computed scale
        layer = _layer(found["weight"], node, index)
        if any(key.startswith(f"{layer}.") for key in out):
            raise ArgumentError(f"two nodes are called {layer!r}.")
        for name, key in found.items():
            out[f"{layer}.{name}"] = _as_torch(node.op_type, name, arrays[key], said)
            used.add(key)
        if node.op_type == "ConvTranspose":
            settings[layer.replace(".", "/")] = {"transposed": True}
        if node.op_type in NORMS:
            _, epsilon, momentum = NORMS[node.op_type]
            settings[layer.replace(".", "/")] = {"epsilon": said.get("epsilon", epsilon)}
            if momentum is not None:
                momentum = said.get("momentum", momentum)
                settings[layer.replace(".", "/")] |= {"momentum": momentum, "unbiased": False, "debias": False}
    rest = {key: value for key, value in arrays.items() if key not in used and value.dtype.kind == "f" and value.ndim}
    return {**out, **rest}, "onnx", settings


def _attributes(onnx: Any, node: Any) -> dict[str, Any]:
    """Floats are float32 in the file: the shortest decimal that rounds to them is what was meant."""
    values = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
    return {name: float(str(np.float32(v))) if isinstance(v, float) else v for name, v in values.items()}


def _as_torch(op: str, name: str, value: np.ndarray, said: dict[str, Any]) -> np.ndarray:
    if name == "weight" and (op == "MatMul" or (op == "Gemm" and not said.get("transB", 0))):
        value = value.T
    if op == "Gemm" and (said.get("alpha", 1.0), said.get("beta", 1.0)) != (1.0, 1.0):
        value = value * np.asarray(said.get("alpha" if name == "weight" else "beta", 1.0), value.dtype)
    return value


def _layer(weight: str, node: Any, index: int) -> str:
    """The weight's own name without its last part, else the node's, else its place in the graph."""
    if "." in weight and weight.rpartition(".")[2] in ("weight", "scale", "gamma", "kernel", "w"):
        return weight.rpartition(".")[0]
    return (node.name or f"{node.op_type}_{index}").strip("/").replace("/", ".")


def _biases(graph: Any, arrays: dict[str, np.ndarray]) -> dict[str, str]:
    """A MatMul has no bias: it is the Add after it."""
    out = {}
    for node in graph.node:
        if node.op_type == "Add":
            for value, bias in (node.input, node.input[::-1]):
                if bias in arrays and value not in arrays and arrays[bias].ndim == 1:
                    out[value] = bias
    return out
