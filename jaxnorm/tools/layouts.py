"""The axes of kernels: `*` for the spatial ones, i for inputs, o for outputs.

| | Dense and Conv | transposed Conv | flipped |
|---|---|---|---|
| Flax | * i o | * i o | no |
| torch, ONNX | o i * | i o * | yes |
| Equinox | o i * | o i * | no |
| Keras | * i o | * o i | yes |
| Haiku | * i o | * o i | no |

With groups, i counts the inputs of one group. A transposed convolution is a convolution of an input with holes; half of
the libraries store its kernel, and half that of the convolution whose gradient it is, which runs the other way.
"""

import numpy as np

CONV = {"flax": "*io", "torch": "oi*", "onnx": "oi*", "equinox": "oi*", "keras": "*io", "haiku": "*io"}
TRANSPOSED = {"flax": "*io", "torch": "io*", "onnx": "io*", "equinox": "oi*", "keras": "*oi", "haiku": "*oi"}
FLIPPED = {"torch", "onnx", "keras"}


def relaid(kernel: np.ndarray, source: str, target: str, transposed: bool) -> tuple[np.ndarray, str]:
    """The kernel in the target's layout, and what was done to it."""
    if kernel.ndim < 2:
        return kernel, ""
    table = TRANSPOSED if transposed else CONV
    done = []
    if table[source] != table[target]:
        axes = dict(zip(_axes(table[source], kernel.ndim), range(kernel.ndim), strict=True))
        kernel = kernel.transpose([axes[name] for name in _axes(table[target], kernel.ndim)])
        done.append(f"{table[source]} -> {table[target]}")
    if transposed and (source in FLIPPED) != (target in FLIPPED):
        where = tuple(i for i, name in enumerate(_axes(table[target], kernel.ndim)) if name not in ("i", "o"))
        kernel = np.flip(kernel, where)
        done.append("flipped")
    return kernel, ", ".join(done)


def _axes(order: str, ndim: int) -> list[str]:
    return [name for part in order for name in ([str(k) for k in range(ndim - 2)] if part == "*" else [part])]


def fitted(value: np.ndarray, name: str, shape: tuple[int, ...], norm: bool) -> tuple[np.ndarray, str]:
    """Shapes of the same numbers: axes of length 1 in a norm's or a bias's, and Keras's kernel of a depthwise Conv."""
    if value.shape == shape:
        return value, ""
    if (norm or name == "bias") and [n for n in value.shape if n != 1] == [n for n in shape if n != 1]:
        return value.reshape(shape), "reshaped"
    return value, ""


def depthwise(value: np.ndarray, shape: tuple[int, ...], source: str, target: str) -> tuple[np.ndarray, str]:
    """Keras keeps (*, i, multiplier) where the others have one input for each of i * multiplier outputs."""
    if "keras" not in (source, target) or value.shape == shape or value.ndim != len(shape) or value.ndim < 3:
        return value, ""
    (*space, i, o), (*there, j, p) = value.shape, shape
    if space == there and i * o == j * p and (j == 1 if source == "keras" else i == 1):
        return value.reshape(shape), "depthwise"
    return value, ""
