"""The cube: which entries of an array share a mean and a variance, drawn from `layout` and `over`."""

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from jaxnorm.errors import ArgumentError, named, nearest
from jaxnorm.inspect.figure import COLOURS, DARK, OTHER, figure, to_rgb
from jaxnorm.layout import ELLIPSIS, Names, averaged, flat, parse, parse_list, text_of
from jaxnorm.table import norms as table

# One step along each side of the cube, in the plane: a parallel projection, seen from the front, the right and above.
RIGHT, DEEP, UP = np.array([0.92, -0.20]), np.array([0.58, 0.36]), np.array([0.0, 0.95])
SHADES = {"front": 1.0, "side": 0.86, "top": 1.1}  # light comes from above
PALE = ((0.93, 0.93, 0.93), (0.84, 0.84, 0.84))
ROW = 4  # cubes in a line


@dataclasses.dataclass(frozen=True)
class Cube:
    """Three sides, each a list of axes with their sizes, the last running fastest; the axes that are averaged."""

    right: dict[str, int]
    deep: dict[str, int]
    up: dict[str, int]
    over: tuple[str, ...]
    devices: tuple[str, ...]  # mapped axes
    none: bool  # no statistics
    caption: str

    def shared(self, right: np.ndarray, deep: np.ndarray, up: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Of the cells at these places: whether they share the statistics of the one that is picked, the first channel
        of the last example; and 0 or 1, other than that of the neighbours that have other statistics."""
        places = {
            **_unravel(self.right, right, np.prod(list(self.right.values()), dtype=int) - 1),
            **_unravel(self.deep, deep, 0),
            **_unravel(self.up, up, np.prod(list(self.up.values()), dtype=int) - 1),
        }
        same, parity = np.ones(np.shape(right), bool), np.zeros(np.shape(right), int)
        for name, (at, picked) in places.items():
            if name not in self.over:
                same &= at == picked
                parity += at
        return same, parity % 2


def _unravel(side: dict[str, int], at: np.ndarray, picked: int) -> dict[str, tuple[np.ndarray, int]]:
    sizes = tuple(side.values()) or (1,)
    where, one = np.unravel_index(at, sizes), np.unravel_index(picked, sizes)
    return {name: (where[i], int(one[i])) for i, name in enumerate(side)}


@named
def plot_cube(
    norms: str | Sequence[str] | None = None, *, layout: Names | None = None, over: Names | None = None
) -> Any:
    """A picture of which entries share a mean and a variance: a cube for each norm.

        entries with the same place along all axes but those in `over` share one mean and one variance

    One set of them is coloured. The others are two greys, in turn.

    Args:
        norms: a name of `jaxnorm.norms()`, or several, side by side. Norms of weights show a kernel.
        layout: instead, any layout. What `...` stands for, and dimensions beyond three, are folded into one side.
        over: the axes whose elements are averaged, with `layout`. A mapped axis among them makes two cubes, of two
            devices.

    Returns:
        A matplotlib Figure.

    Raises:
        ArgumentError: when there is no such norm, `layout` and `over` are not given together, or matplotlib is missing.
        LayoutError: when they cannot be read.

    Example:
        >>> import jaxnorm as jn
        >>> figure = jn.inspect.plot_cube(["batch", "layer", "instance", "group"])
        >>> len(figure.axes)
        4
        >>> jn.inspect.plot_cube(layout="n h w c", over="n h w devices").axes[0].get_title()
        'n h w c'

    Source: the idea is figure 2 of Wu and He 2018, "Group Normalization".

    Differs from: a drawing: it reads what the norms read.
    """
    cubes = []
    if norms is None:
        if layout is None or over is None:
            raise ArgumentError("plot_cube takes the name of a norm, or layout= and over= together.")
        cubes.append((text_of(layout), cube(layout, over), OTHER))
    elif layout is not None or over is not None:
        raise ArgumentError("plot_cube takes names of norms, or layout= and over=, not both.")
    for name in [norms] if isinstance(norms, str) else norms or ():
        known = {row.name.lower(): row for row in table()}
        row = known.get(str(name).lower())
        if row is None:
            raise ArgumentError(f"there is no norm {name!r}.{nearest(str(name), known)} See jaxnorm.norms().")
        cubes.append((row.name, cube(row.layout, row.over), COLOURS.get(row.name, OTHER)))
    if not cubes:
        raise ArgumentError("plot_cube needs the name of a norm, at least one.")
    across = min(len(cubes), ROW)
    lines = -(-len(cubes) // ROW)
    wide = max(len(c.devices) for _, c, _ in cubes) > 0
    picture = figure(3.3 * across * (1.8 if wide else 1), 3.7 * lines)
    panels = picture.subplots(lines, across, squeeze=False)
    for axes in panels.flat:
        axes.set_axis_off()
        axes.set_aspect("equal")
    for axes, (title, one, colour) in zip(panels.flat, cubes, strict=False):
        axes.set_title(title, fontsize=13, color=DARK, fontweight="bold")
        _draw(axes, one, colour)
    return picture


def cube(layout: Names, over: Names) -> Cube:
    """The sides of a layout: examples to the right, channels into the depth, all else upwards."""
    dims = list(parse(layout))
    names = flat(parse(layout))
    mapped = tuple(name.rstrip("?") for name in parse_list(over, "over") if name.rstrip("?") not in names)
    gone = averaged(layout, over)
    if not dims:
        raise ArgumentError("layout needs a dimension at least.")
    if (ELLIPSIS,) in dims:  # space and, where nothing else stands for them, the examples or a kernel's inputs
        more = "i" if "o" in names else "n"
        if len(dims) < 3 and more not in names:
            dims.insert(0, (more,))
            gone += (more,) * (ELLIPSIS in gone)
    plain = [dim for dim in dims if dim != (ELLIPSIS,)]
    order = [("o",), ("i",)] if {("o",), ("i",)} <= {*dims} else [("n",)] * (("n",) in plain) + plain
    right = order[0] if len(dims) > 1 and order else ()
    deep = order[1] if order[0:1] == [("o",)] else next((dim for dim in reversed(plain) if dim != right), ())
    up = tuple(name for dim in dims if dim not in (right, deep) for name in dim)
    sides = _sizes(right, 4), _sizes(deep, 6), _sizes(up, 4)
    caption = f'layout  "{text_of(layout)}"\nover  "{text_of(over)}"\n'
    none = not parse(over, "over")
    each = ", ".join(_word(name) for dim in dims for name in dim if name not in gone)
    caption += "no statistics of x" if none else f"one mean and variance for {f'each {each}' if each else 'all'}"
    return Cube(*sides, gone, mapped, none, caption)


def _word(name: str) -> str:
    return "space" if name == ELLIPSIS else name


def _sizes(names: tuple[str, ...], alone: int) -> dict[str, int]:
    if len(names) < 2:
        return dict.fromkeys(names, alone)
    if len(names) > 2:
        return dict.fromkeys(names, 2)
    first, second = names
    return {first: alone // 2, second: 2}


def _draw(axes: Any, one: Cube, colour: str) -> None:
    right, deep, up = (int(np.prod(list(side.values()), dtype=int)) for side in (one.right, one.deep, one.up))
    for device in range(2 if one.devices else 1):  # devices are averaged, or they would not stand in over
        start = np.array([device * (right * RIGHT[0] + deep * DEEP[0] + 1.5), 0.0])
        for face, place, corners in _cells(right, deep, up):
            same, parity = (z.item() for z in one.shared(*map(np.array, place)))
            tone = PALE[parity] if one.none or not same else to_rgb(colour)
            shade = tuple(min(1.0, part * SHADES[face]) for part in tone)
            axes.fill(*(start + corners).T, facecolor=shade, edgecolor="white", linewidth=0.8)
        _sides(axes, one, start, (right, deep, up))
        if one.devices:
            above = start + right / 2 * RIGHT + deep * DEEP + up * UP + [0, 0.6]
            axes.annotate(f"{' '.join(one.devices)} {device}", above, ha="center", fontsize=10, color=DARK)
    axes.text(0.5, -0.03, one.caption, transform=axes.transAxes, ha="center", va="top", fontsize=9, color=DARK)


def _sides(axes: Any, one: Cube, start: np.ndarray, size: tuple[int, int, int]) -> None:
    """The outline, and the names along three edges."""
    right, deep, up = (n * way for n, way in zip(size, (RIGHT, DEEP, UP), strict=True))
    corner = right + up
    for end in (up, right, corner + deep):
        axes.plot(*np.stack([start + corner, start + end]).T, color="white", linewidth=2)
    rim = np.stack([0 * right, right, right + deep, corner + deep, up + deep, up, 0 * right])
    axes.plot(*(start + rim).T, color=DARK, linewidth=1, solid_joinstyle="round")
    for names, middle, away, how in (
        (one.right, right / 2, np.array([-0.1, -0.35]), {"ha": "center", "va": "top"}),
        (one.deep, right + deep / 2, np.array([0.2, -0.3]), {"ha": "left", "va": "top"}),
        (one.up, up / 2, np.array([-0.3, 0.0]), {"ha": "right", "va": "center"}),
    ):
        if names:
            axes.annotate(" ".join(map(_word, names)), start + middle + away, color=DARK, fontsize=10, **how)


def _cells(right: int, deep: int, up: int) -> Iterator[tuple[str, tuple[int, int, int], np.ndarray]]:
    """The cells that are seen: their face, their place, their corners."""
    for face, places, ways in (
        ("front", itertools.product(range(right), [0], range(up)), (RIGHT, UP)),
        ("side", itertools.product([right - 1], range(deep), range(up)), (DEEP, UP)),
        ("top", itertools.product(range(right), range(deep), [up - 1]), (RIGHT, DEEP)),
    ):
        a, b = ways
        for place in places:
            r, d, u = place
            origin = (r + (face == "side")) * RIGHT + d * DEEP + (u + (face == "top")) * UP
            yield face, place, np.stack([origin, origin + a, origin + a + b, origin + b])
