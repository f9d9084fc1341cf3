"""What is wrong with one norm, by the numbers that it holds. See `whole.py` for what only the others tell."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from jaxnorm.inspect.layers import Layer

WRONG, NOTE = "wrong", "note"
COLLAPSED = 1e-12  # a variance that no input of a trained net has
HUGE_VAR, HUGE_MEAN = 1e12, 1e8
DEAD = 1e-6  # a scale that lets nothing through
FAINT = 1e-3  # of the largest scale
TINY = float(np.finfo(np.float32).tiny)

Said = tuple[str, str]  # grade, text


@dataclass(frozen=True)
class Settings:
    """How the norms are used, where it is known."""

    momentum: float | None = None
    epsilon: float = 1e-5
    debias: bool = False
    steps: int | None = None  # of training, for norms that do not count


def of_layer(layer: Layer, settings: Settings) -> Iterator[Said]:
    """Grade and text of each finding."""
    half = layer.values.keys() & {"mean", "var"}
    if len(half) == 1 and not layer.averaged:
        (there,) = half
        yield WRONG, f"it has {layer.own[there]} but no {'var' if there == 'mean' else 'mean'}"
    yield from _dtypes(layer)
    broken = list(not_finite(layer))
    yield from broken
    yield from _shapes(layer)
    if broken:
        return
    yield from _variances(layer, settings)
    yield from _scales(layer)
    yield from _updates(layer, settings)


def _dtypes(layer: Layer) -> Iterator[Said]:
    for name in sorted(layer.values.keys() & {"mean", "var", "cov"}):
        dtype = layer.values[name].dtype
        if dtype.kind in "iub":
            yield WRONG, f"{layer.own[name]} is stored as {dtype}, which has no fractions"
        elif dtype.itemsize < 4:
            yield NOTE, f"{layer.own[name]} is stored as {dtype}: training on loses updates to rounding"


def not_finite(layer: Layer) -> Iterator[Said]:
    """Of which arrays some entries are NaN or infinite."""
    for name in layer.values:
        z = layer.wide(name)
        bad = 0 if z is None else int((~np.isfinite(z)).sum())
        if z is not None and bad:
            yield WRONG, f"{bad} of {z.size} entries of {layer.own[name]} are NaN or infinite"


def _shapes(layer: Layer) -> Iterator[Said]:
    shapes = {name: layer.values[name].shape for name in ("scale", "bias", "mean", "var") if name in layer.values}
    pairs = [("mean", "var"), ("scale", "bias"), ("scale", "mean")]
    if "scale" not in shapes:
        pairs.append(("bias", "mean"))
    for one, other in pairs if layer.norm.kind == "batch" else []:
        if one in shapes and other in shapes and not _fit(shapes[one], shapes[other]):
            names = layer.own[one], layer.own[other]
            yield WRONG, f"{names[0]} has shape {shapes[one]}, {names[1]} {shapes[other]}: of different layers?"


def _fit(a: tuple[int, ...], b: tuple[int, ...]) -> bool:
    """Whether one may lie along some of the dimensions of the other. nnx keeps statistics flat, Haiku has ones."""
    short, long = sorted(([n for n in shape if n != 1] for shape in (a, b)), key=len)
    rest = iter(long)
    return math.prod(a) == math.prod(b) or all(n in rest for n in short)


def _variances(layer: Layer, settings: Settings) -> Iterator[Said]:
    var, mean = layer.wide("var"), layer.wide("mean")
    if var is None or mean is None or not var.size or not layer.averaged or initial(layer):
        return
    n = var.size
    negative, collapsed, low, denormal = (
        int(z.sum()) for z in (var < 0, var < COLLAPSED, var < settings.epsilon, (var > 0) & (var < TINY))
    )
    if negative:
        yield WRONG, f"{negative} of {n} variances are negative"
        return
    if 2 * collapsed >= n:
        yield (
            WRONG,
            f"{collapsed} of {n} variances are below {COLLAPSED:.0e}: its inputs do not vary. Training batches of one?",
        )
    elif low:
        more = f" ({denormal} denormal)" if denormal else ""
        yield NOTE, f"{low} of {n} variances are below epsilon = {settings.epsilon:.3g}{more}, which sets their gain"
    if var.max() > HUGE_VAR or np.abs(mean).max() > HUGE_MEAN:
        yield WRONG, f"diverged: means up to {np.abs(mean).max():.2g}, variances up to {var.max():.2g}"


def _scales(layer: Layer) -> Iterator[Said]:
    """Of norms that have a bias: others may store their scale without its 1."""
    scale, bias = layer.wide("scale"), layer.wide("bias")
    if scale is None or not scale.size or not (layer.averaged or bias is not None):
        return
    n, size = scale.size, np.abs(scale)
    dead = int((size < DEAD).sum())
    faint = int((size < FAINT * size.max()).sum())
    if 2 * dead >= n and bias is not None and bias.any():
        yield WRONG, f"{dead} of {n} scales are 0 though its bias is trained: these channels are constants"
    elif dead == n:
        yield NOTE, "all scales are 0, as at the start of a residual branch"
    elif faint:
        yield NOTE, f"{faint} of {n} scales are below {FAINT:g} of the largest"


def _updates(layer: Layer, settings: Settings) -> Iterator[Said]:
    """What is left of the initial 0 and 1 in an average that is not debiased: momentum to the number of updates."""
    count, momentum = count_of(layer), settings.momentum
    if not (layer.averaged and momentum) or settings.debias or "mean_hidden" in layer.values or initial(layer):
        return
    if count == 0:
        yield NOTE, "its count is 0, its statistics are not the initial ones"
    t = count or settings.steps
    if not t:
        return
    left = momentum**t
    if left > 0.05:
        half = "never" if momentum == 1 else f"{math.log(0.5) / math.log(momentum):.0f}"
        text = f"{t} updates, half-life at momentum {momentum:g} is {half}: still {left:.0%} of the initial 0 and 1"
        yield (WRONG if left > 0.5 else NOTE), text


def count_of(layer: Layer) -> int | None:
    """How often its statistics were updated, where that is counted."""
    count = layer.values.get("num_updates")
    return None if count is None or not count.size else int(count.max())


def initial(layer: Layer) -> bool:
    """Whether its statistics are those before the first update: mean 0, var 1; Haiku's averages are 0 and 0."""
    if not layer.averaged:
        return False
    hidden = [layer.wide(name) for name in ("mean_hidden", "var_hidden") if name in layer.values]
    if hidden:
        return not any(z is not None and z.any() for z in hidden)
    mean, var = layer.wide("mean"), layer.wide("var")
    return bool(mean.size) and not mean.any() and bool((var == 1).all())
