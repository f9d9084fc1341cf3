"""What the Flax modules share: which row of the table a module is, in the words of the verbs. No flax in here.

A module says its axes in one of two languages: Flax's numbers (`axis`, `reduction_axes`, `feature_axes`, `axis_name`)
or names (`layout`, `over`, `features`). Both become a `Row`. Numbers are positions in a layout of generated names,
"d0 d1 d2", so what a norm averages when nothing is said is written once, by name.

The classes here are mixed into a linen and into an nnx module, which hold the arguments, the parameters and the state.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from jaxnorm.errors import ArgumentError, LayoutError
from jaxnorm.layout import (
    Names,
    after_first,
    averaged,
    flat,
    kept,
    last,
    meet,
    parse,
    parse_list,
    split_axis,
    text_of,
)
from jaxnorm.mapped import Groups, is_mapped
from jaxnorm.modules import NOTHING, check_names, hashable, inexact, lengths_of, naming
from jaxnorm.moments import Moments, moments
from jaxnorm.normalize import normalize, standardize
from jaxnorm.operands import check_count, offset_scale
from jaxnorm.running import RunningStats, update


@dataclasses.dataclass(frozen=True)
class Row:
    """A norm of an x of known rank: what `standardize` is told of its axes."""

    layout: Names
    over: Names
    features: Names
    sizes: dict[str, int]
    groups: Groups | None = None

    def lengths(self, names: Names, shape: tuple[int, ...]) -> tuple[int, ...]:
        """How long an x of `shape` is along `names`; a composed dimension counts whole."""
        return lengths_of(meet(self.layout, shape, self.sizes), names)

    @property
    def running(self) -> tuple[str, ...]:
        """The axes of running statistics: those features that are not averaged. Ghosts are averaged later."""
        return tuple(name for name in flat(parse(self.features)) if name in kept(self.layout, self.over))


Arrays = tuple[jax.Array | None, jax.Array | None]


@dataclasses.dataclass(frozen=True)
class Given:
    """scale and bias that a call brings, in the place of parameters."""

    scale: Any = None
    bias: Any = None
    features: Names | None = None

    def beside(self, own: Arrays, along: Names) -> tuple[jax.Array | None, jax.Array | None, Names]:
        """scale, bias and their features, when the module has its `own` along `along`."""
        arrays = []
        for name, mine, theirs in zip(("scale", "bias"), own, (self.scale, self.bias), strict=True):
            if mine is not None and theirs is not None:
                raise ArgumentError(
                    f"{name} is given in the call, and is a parameter too. Build the module with use_{name}=False."
                )
            arrays.append(mine if theirs is None else jnp.asarray(theirs))
        if self.features is not None and any(mine is not None for mine in own):
            raise ArgumentError(
                f'features="{text_of(self.features)}" is of a scale and a bias given in the call, and the module has a '
                f'parameter along "{text_of(along)}". Build it with use_scale=False and use_bias=False.'
            )
        return arrays[0], arrays[1], along if self.features is None else self.features


class Norm:
    """A norm as a Flax module. What it averages, and where its parameters lie, is up to the three methods below."""

    _axes: ClassVar[Mapping[str, Any]]  # Flax's own arguments about axes, with their defaults
    _default_layout: ClassVar[str] = "... c"
    _center: ClassVar[bool] = True

    layout: Names | None
    over: Names | None
    features: Names | None
    sizes: Any
    axis_name: Any
    axis_index_groups: Any
    epsilon: float

    def _positions(self, at: Callable) -> tuple[Names | None, Names | None]:
        """over and features as Flax's arguments give them; `at` turns numbers into names."""
        raise NotImplementedError

    def _complete(self, layout: Names, over: Names | None, features: Names | None) -> tuple[Names, Names]:
        """over and features where they are left out."""
        raise NotImplementedError

    def _named(self) -> dict[str, Any]:
        ours = {name: getattr(self, name) for name in ("layout", "over", "features", "sizes")}
        return {name: value for name, value in ours.items() if value is not None}

    def _settle(self) -> None:
        """At construction: one language, that can be read, in values that can be hashed."""
        defaults = {"axis_name": None, "axis_index_groups": None, **self._axes}
        for name in ("sizes", *defaults):
            setattr(self, name, hashable(getattr(self, name)))
        ours = self._named()
        theirs = {name: getattr(self, name) for name, default in defaults.items() if getattr(self, name) != default}
        with naming(self):
            if ours and theirs:
                both = " and ".join(f"{name}={value!r}" for given in (theirs, ours) for name, value in given.items())
                raise LayoutError(
                    f"{both} are two ways to say the axes: Flax's by number, jaxnorm's by name. Use one; with names, a "
                    "mapped axis stands in over."
                )
            if self.axis_index_groups is not None and len(_tuple(self.axis_name)) > 1:
                raise LayoutError(f"axis_index_groups cuts one mapped axis, axis_name={self.axis_name!r} are several.")
            check_names(self.layout, self._default_layout, self.over, self.features)

    def _row(self, shape: tuple[int, ...], sync: bool = True) -> Row:
        """This norm for an x of `shape`; without `sync`, of this device alone."""
        groups = None
        if self._named():
            layout = self.layout or self._default_layout
            over, features = self._complete(layout, self.over, self.features)
        else:
            mapped = _tuple(self.axis_name)
            layout = _generated(len(shape), mapped)
            over, features = self._positions(lambda axes: tuple(layout[i] for i in positions(axes, len(shape))))
            over, features = self._complete(layout, over, features)
            over = (*over, *mapped) or NOTHING
            if mapped and self.axis_index_groups is not None:
                groups = {mapped[0].rstrip("?"): self.axis_index_groups}
        if not sync:
            over, groups = averaged(layout, over) or NOTHING, None
        return Row(layout, over, features, dict(self.sizes or ()), groups)

    def _along(self, features: Names) -> Names:
        """What a call says of its scale and bias, in the words of the row."""
        return features

    def _affine(self, row: Row, own: Arrays, given: Given) -> tuple[Row, jax.Array | None, jax.Array | None]:
        """The row, scale and bias: the module's own, or those of the call."""
        if given.features is not None and not self._named():
            raise LayoutError(
                f'features="{text_of(given.features)}" in the call needs names for the dimensions: give the module its '
                "layout."
            )
        scale, bias, features = given.beside(own, row.features)
        if given.features is not None:
            row = dataclasses.replace(row, features=self._along(features))
        return row, scale, bias

    def _standardize(self, x, row: Row, scale, bias, dtype, *, mask, weights) -> tuple[jax.Array, Moments]:
        return standardize(
            inexact(x), row.layout, row.over, scale=scale, bias=bias, features=row.features, epsilon=self.epsilon,
            mask=mask, weights=weights, center=self._center, sizes=row.sizes, groups=row.groups, dtype=dtype,
        )  # fmt: skip


class Batch(Norm):
    """Over everything but the features, with running statistics along them."""

    _axes: ClassVar[Mapping[str, Any]] = {"axis": -1}
    axis: Any
    momentum: float | None
    debias: bool
    unbiased: bool

    def _positions(self, at):
        return None, at(self.axis)

    def _complete(self, layout, over, features):
        if features is None:
            features = last(layout) if over is None else kept(layout, over)
        return _others(flat(parse(layout)), features) if over is None else over, features

    def _counts(self) -> bool:
        """Whether the number of updates matters. Where it does not, the state holds exactly Flax's variables."""
        return self.momentum is None or self.debias

    def _train(self, x, row: Row, running: RunningStats, *arrays, **slots) -> tuple[jax.Array, RunningStats, Moments]:
        y, stats = self._standardize(x, row, *arrays, **slots)
        return y, update(running, stats, self.momentum, debias=self.debias, unbiased=self.unbiased), stats

    def _check(self, x, row: Row, stats: Moments) -> None:
        """Not at initialisation, where one example is common, and nothing is kept."""
        check_count(x, stats.mean.size, row.layout, row.over, row.sizes, row.groups)

    def _moments(self, x, row: Row, **slots) -> Moments:
        """What training would see of x."""
        return moments(inexact(x), row.layout, row.over, sizes=row.sizes, groups=row.groups, **slots)

    def _evaluate(self, x, row: Row, running: RunningStats, scale, bias, dtype) -> jax.Array:
        return normalize(
            inexact(x), running, row.layout, scale=scale, bias=bias, features=row.features, epsilon=self.epsilon,
            sizes=row.sizes, dtype=dtype,
        )  # fmt: skip


class Layer(Norm):
    """Over the last dimension; features are what is averaged."""

    _axes: ClassVar[Mapping[str, Any]] = {"reduction_axes": -1, "feature_axes": -1}
    reduction_axes: Any
    feature_axes: Any

    def _positions(self, at):
        return at(self.reduction_axes), at(self.feature_axes)

    def _complete(self, layout, over, features):
        over = flat(parse(last(layout))) if over is None else over
        return over, averaged(layout, over) if features is None else features


class RMS(Layer):
    """Layer, not centred."""

    _center = False
    scale_offset: float

    def _standardize(self, x, row: Row, scale, bias, dtype, **slots):
        return super()._standardize(x, row, offset_scale(scale, self.scale_offset), bias, dtype, **slots)


class Instance(Norm):
    """Over everything but the first dimension and the features."""

    _axes: ClassVar[Mapping[str, Any]] = {"feature_axes": -1}
    _default_layout = "n ... c"
    feature_axes: Any

    def _positions(self, at):
        features = at(self.feature_axes)
        if at(0)[0] in features:  # Flax's words, which its users may match
            raise LayoutError(
                "The channel axes cannot include the leading dimension as this is assumed to be the batch axis."
            )
        return None, features

    def _complete(self, layout, over, features):
        features = last(layout) if features is None else features
        return _others(flat(parse(layout))[1:], features) if over is None else over, features


class Group(Norm):
    """Over everything but the first dimension and the group, in which the features axis is split."""

    _axes: ClassVar[Mapping[str, Any]] = {"reduction_axes": None}
    _default_layout = "n ... c"
    reduction_axes: Any
    num_groups: int | None
    group_size: int | None

    def _positions(self, at):
        return (None if self.reduction_axes is None else at(self.reduction_axes)), None

    def _complete(self, layout, over, features):
        features = last(layout) if features is None else features
        if over is None:
            c = text_of(features)
            split_axis(layout, c)  # one plain axis
            over = (c,) if len(parse(layout)) == 1 else (*after_first(layout, c), c)
        return over, features

    def _groups(self, channels: int) -> int:
        return groups_of(channels, self.num_groups, self.group_size)

    def _along(self, features):
        layout = self.layout or self._default_layout
        c = text_of(last(layout) if self.features is None else self.features)
        split = split_axis(layout, c)[1]
        return tuple(split if name == c else name for name in parse_list(features, "features"))

    def _row(self, shape: tuple[int, ...], sync: bool = True) -> Row:
        row = super()._row(shape, sync)
        c, over = text_of(row.features), parse_list(row.over, "over")
        layout, split, member = split_axis(row.layout, c)
        if c not in over:
            raise LayoutError(
                f"GroupNorm averages over parts of {c!r}, so over (Flax: reduction_axes) must include it.\n"
                f'  over "{text_of(over)}", layout "{text_of(row.layout)}"'
            )
        count = self._groups(row.lengths(c, shape)[0])
        return dataclasses.replace(
            row,
            layout=layout,
            over=tuple(member if name == c else name for name in over),
            features=split,
            sizes={**row.sizes, f"{c}_group": count},
        )


def groups_of(channels: int, num_groups: int | None, group_size: int | None) -> int:
    """The number of groups, which Flax lets one say in two ways."""
    if (num_groups is None) == (group_size is None):
        raise ArgumentError(f"give num_groups or group_size, and None for the other: got {num_groups=}, {group_size=}.")
    name, size = ("num_groups", num_groups) if group_size is None else ("group_size", group_size)
    if not isinstance(size, int) or size < 1 or channels % size:
        raise LayoutError(f"{name}={size!r} does not divide the {channels} channels.")
    return size if group_size is None else channels // size


def _tuple(names: Any) -> tuple:
    return () if names is None else names if isinstance(names, tuple) else (names,)


def _others(names: tuple[str, ...], features: Names) -> tuple[str, ...]:
    return tuple(name for name in names if name not in flat(parse(features)))


def _generated(ndim: int, mapped: tuple[str, ...]) -> tuple[str, ...]:
    """d0 d1 ..., or d_0 d_1 ... where such a name is a mapped axis."""
    letter = "d"
    while any(f"{letter}{i}" in mapped or is_mapped(f"{letter}{i}") for i in range(ndim)):
        letter += "_"
    return tuple(f"{letter}{i}" for i in range(ndim))


def positions(axes: int | Iterable[int], ndim: int) -> tuple[int, ...]:
    """Flax's axes from the front, none twice, in the order of a Python set: parameters are laid out in it."""
    axes = tuple(axes) if isinstance(axes, Iterable) else (axes,)
    for axis in axes:
        if not -ndim <= axis < ndim:
            raise LayoutError(f"axis {axis} is out of range: x has {ndim} dimensions.")
    return tuple({axis % ndim for axis in axes})
