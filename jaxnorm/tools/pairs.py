"""Which layer of one model is which of another: by equal names, by names given, or in order."""

import re
from collections.abc import Callable, Mapping

from jaxnorm.errors import ArgumentError, nearest
from jaxnorm.tools.models import Layer, Model

Names = Mapping[str, str] | Callable[[str], str | None] | str | None


def paired(target: Model, source: Model, names: Names) -> dict[str, str | None]:
    """For every layer of the target the path of the source's, or None."""
    if names is None:
        return {path: path for path in target.layers}
    if isinstance(names, str) and names == "in order":
        return _in_order(target, source)
    if callable(names):
        found = {path: names(path) for path in target.layers}
        return {path: None if other is None else _slashes(other) for path, other in found.items()}
    if not isinstance(names, Mapping):
        raise ArgumentError(f'names is a mapping, a function or "in order", got {names!r}.')
    patterns = [_Pattern(head, other) for head, other in names.items()]
    out: dict[str, str | None] = {}
    for path in target.layers:
        found = {}
        for pattern in patterns:
            if (other := pattern.of(path)) is not None:
                found.setdefault(pattern.weight, {})[other] = pattern.head
        best = found[max(found)] if found else {path: ""}
        if len(best) > 1:
            raise ArgumentError(f"two names for {path!r}: {', '.join(f'{h!r} says {o!r}' for o, h in best.items())}.")
        out[path] = next(iter(best))
    for pattern in patterns:
        if not any(pattern.of(path) is not None for path in target.layers):
            known = list(target.layers)
            raise ArgumentError(f"names has {pattern.head!r}, which the target lacks.{nearest(pattern.head, known)}")
    return out


class _Pattern:
    """`block_{}/bn` -> `blocks.{}.1`: of a layer, or of all that lies below."""

    def __init__(self, head: str, other: str):
        self.head, parts = _slashes(head), _slashes(head).split("{}")
        self.parts = _slashes(other).split("{}")
        if len(self.parts) > len(parts):
            raise ArgumentError(f"names has {other!r}, with more places {{}} than {head!r}.")
        body = "([^/]+?)".join(map(re.escape, parts))
        self.regex = re.compile(f"{body}(?:/(.*))?" if self.head else "(.*)")
        self.weight = (self.head.count("/") + bool(self.head), -len(parts))  # the longer one wins, then the plainer

    def of(self, path: str) -> str | None:
        found = self.regex.fullmatch(path)
        if not found:
            return None
        *places, rest = found.groups()
        text = self.parts[0] + "".join(map(str.__add__, places, self.parts[1:]))
        return "/".join(part for part in (text, rest) if part)


def _slashes(path: str) -> str:
    if not isinstance(path, str):
        raise ArgumentError(f"names says {path!r} where a path is needed.")
    return path.replace(".", "/").strip("/")


def _in_order(target: Model, source: Model) -> dict[str, str | None]:
    """The k-th of each sort with the k-th: batch norms, other norms, kernels of each rank."""
    ours, theirs = _sorts(target), _sorts(source)
    out: dict[str, str | None] = {path: path for path in target.layers}
    for sort in ours | theirs:
        mine, others = ours.get(sort, []), theirs.get(sort, [])
        if len(mine) != len(others):
            raise ArgumentError(
                f'names="in order": the target has {len(mine)} {sort}, the source {len(others)}.\n'
                f"  target: {', '.join(mine) or 'none'}\n  source: {', '.join(others) or 'none'}"
            )
        out |= zip(mine, others, strict=True)
    return out


def _sorts(model: Model) -> dict[str, list[str]]:
    out: dict[str, list[str]] = {}
    for path, layer in model.layers.items():
        if layer.kind != "other":
            out.setdefault(_sort(layer), []).append(path)
    return out


def _sort(layer: Layer) -> str:
    if layer.norm:
        return "batch norms" if layer.kind == "batch" else "other norms"
    return f"kernels of {layer.leaves['kernel' if 'kernel' in layer.leaves else 'embedding'].ndim} axes"
