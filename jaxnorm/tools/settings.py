"""The settings of norms in the words of each framework. In ours momentum is the part of the old value that is kept."""

from collections.abc import Mapping
from typing import Any

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


def check(given: Mapping[str, Any]) -> None:
    """Settings that the user gives are in our words."""
    for name in given:
        if name not in WORDS:
            raise ArgumentError(f"settings has no {name!r}.{nearest(name, WORDS)} They are: {', '.join(WORDS)}.")
    momentum = given.get("momentum")
    if momentum is not None and not 0 <= momentum <= 1:
        raise ArgumentError(f"momentum is the part of the old value that is kept, 0 to 1, got {momentum!r}.")


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
