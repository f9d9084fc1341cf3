"""The settings of norms in the words of each framework. In ours momentum is the part of the old value that is kept."""

import math
from collections.abc import Mapping
from numbers import Real
from typing import Any

import numpy as np

from jaxnorm.errors import ArgumentError, nearest

WORDS = ("momentum", "epsilon", "unbiased", "debias")
_FLAX = {"epsilon": 1e-6}
# What a framework does when nothing is said, by the kind of norm. What is not here depends on more than the kind:
# torch's RMSNorm and a LayerNorm without bias look alike and have other epsilons.
DEFAULTS: dict[str, dict[str, dict[str, Any]]] = {
    "flax": {
        "batch": {"momentum": 0.99, "epsilon": 1e-5, "unbiased": False, "debias": False},
        "scale and bias": _FLAX, "scale": _FLAX,
    },
    "torch": {
        "batch": {"momentum": 0.9, "epsilon": 1e-5, "unbiased": True, "debias": False},
        "scale and bias": {"epsilon": 1e-5},
    },
    "keras": {
        "batch": {"momentum": 0.99, "epsilon": 1e-3, "unbiased": False, "debias": False},
        "scale and bias": {"epsilon": 1e-3},
    },
    "haiku": {
        "batch": {"epsilon": 1e-5, "unbiased": False, "debias": True},  # its decay_rate has no default
        "scale and bias": {"epsilon": 1e-5}, "scale": {"epsilon": 1e-5},
    },
    "equinox": {
        "batch": {"momentum": 0.99, "epsilon": 1e-5, "unbiased": False, "debias": False},
        "scale and bias": {"epsilon": 1e-5}, "scale": {"epsilon": 1e-5},
    },
    "onnx": {
        "batch": {"momentum": 0.9, "epsilon": 1e-5, "unbiased": False, "debias": False},
        "scale and bias": {"epsilon": 1e-5}, "scale": {"epsilon": 1e-5},
    },
}  # fmt: skip


# What a framework's own batch norm does, and cannot be told to do otherwise.
FIXED: dict[str, dict[str, bool]] = {
    "torch": {"unbiased": True, "debias": False},
    "keras": {"unbiased": False, "debias": False},
    "haiku": {"unbiased": False},
    "equinox": {"unbiased": False},
    "onnx": {"unbiased": False, "debias": False},
}


def check(given: Any) -> dict[str, Any]:
    """The settings that the user gives, in our words."""
    if not isinstance(given, Mapping | None):
        raise ArgumentError(f'settings is a mapping as {{"momentum": 0.9}}, got {given!r}.')
    for name, value in (given or {}).items():
        number = isinstance(value, Real) and not isinstance(value, bool)
        if name not in WORDS:
            raise ArgumentError(f"settings has no {name!r}.{nearest(str(name), WORDS)} They are: {', '.join(WORDS)}.")
        if name == "epsilon" and not (number and 0 <= float(value) < math.inf):
            raise ArgumentError(f"epsilon must be a number, not negative, got {value!r}.")
        if name == "momentum" and value is not None and not (number and 0 <= float(value) <= 1):
            raise ArgumentError(f"momentum is the part of the old value that is kept, 0 to 1, or None, got {value!r}.")
        if name in ("unbiased", "debias") and not isinstance(value, bool | np.bool_):
            raise ArgumentError(f"{name} is True or False, got {value!r}.")
    return dict(given or {})


def settled(framework: str, kind: str, said: Mapping[str, Any], given: Mapping[str, Any]) -> tuple[dict[str, Any], str]:
    """The settings of a norm, and whence: given by the user, said by the source, or the framework's default."""
    words = WORDS if kind == "batch" else ("epsilon",)
    layers = {"given": given, "source": said, "default": DEFAULTS[framework].get(kind, {})}
    out: dict[str, Any] = {}
    whence: dict[str, str] = {}
    for word in words:
        for name, layer in layers.items():
            if word in layer:
                out[word], whence[word] = layer[word], name
                break
    return out, " ".join(sorted({*whence.values()}))


def lost(framework: str, wanted: Mapping[str, Any], said: Mapping[str, Any]) -> list[str]:
    """In which way the target goes on otherwise than the source: as its framework must, and as its own norm says."""
    fixed = FIXED.get(framework, {})
    other = [word for word, value in fixed.items() if word in wanted and wanted[word] != value]
    out = []
    if "unbiased" in other:
        out.append(f"{framework} will train {'with' if fixed['unbiased'] else 'without'} Bessel's variance")
    if "debias" in other:
        out.append(f"{framework} will train without debiasing")
    if wanted.get("momentum", 0) is None and framework not in ("flax", "torch"):
        out.append(f"{framework} has no average of all batches")
    apart = [
        f"{word} {said[word]:g}" if isinstance(said[word], float) else f"{word} {said[word]}"
        for word in WORDS
        if word in wanted.keys() & said.keys() - fixed.keys() and not _same(wanted[word], said[word])
    ]
    return [*out, f"its norm says {', '.join(apart)}"] if apart else out


def _same(left: Any, right: Any) -> bool:
    """0.9 may have been 1 - 0.1, in single precision."""
    return left == right or (None not in (left, right) and math.isclose(left, right, rel_tol=1e-6))


def in_words_of(framework: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of the framework's own batch norm. What it cannot be told is left out."""
    momentum, epsilon = settings.get("momentum"), settings.get("epsilon")
    if framework == "torch":
        return {"momentum": None if momentum is None else 1 - momentum, "eps": epsilon}
    if framework in ("keras", "onnx"):
        return {"momentum": momentum, "epsilon": epsilon}
    if framework == "haiku":
        return {"decay_rate": momentum, "eps": epsilon}
    if framework == "equinox":
        return {"momentum": momentum, "eps": epsilon, "mode": "batch" if settings.get("debias") else "ema"}
    return dict(settings)
