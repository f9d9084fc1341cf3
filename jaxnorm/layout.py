"""Names of axes: read them, meet them with a shape, split and join composed dimensions, broadcast by name.

A layout names the dimensions of an array: `"n h w c"`. `...` stands for any number of dimensions, at most once.
`"n ... (g k)"` says that the last dimension is composed of two axes, `g` slow and `k` fast. Inside the package a
layout that has met a shape is a `Frame`: every axis has a name of its own and a size, composed dimensions are
split, and the dimensions under `...` are called `...0`, `...1`.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Mapping
from numbers import Integral

import jax
import jax.numpy as jnp

from jaxnorm.errors import LayoutError, nearest, point
from jaxnorm.sharded import parts_of

Names = str | tuple[str, ...]
Dims = tuple[tuple[str, ...], ...]  # one tuple a dimension: one name, the parts of a composed one, or ("...",)

ELLIPSIS = "..."
_TOKEN = re.compile(r"\s*(?:(?P<word>\.\.\.|[A-Za-z_]\w*\??)|(?P<paren>[()])|(?P<bad>\S+?))")


def text_of(names: Names) -> str:
    return names if isinstance(names, str) else " ".join(names)


@functools.lru_cache(maxsize=1024)
def _parse(text: str, what: str) -> Dims:
    """Names, one level of parentheses, one `...`: everything else is an error that points at the place."""

    def wrong(token: str, why: str) -> LayoutError:
        return LayoutError(f"{what} cannot be read: {why}\n{point(text, token, what)}")

    dims: list[tuple[str, ...]] = []
    group: list[str] | None = None
    for match in _TOKEN.finditer(text.rstrip()):
        token = match.group().strip()
        if match["bad"]:
            raise wrong(token, f"{token!r} is not a name. Use names (letters, digits, _), '...' and one level of ().")
        if token == "(":
            if group is not None:
                raise wrong(token, "parentheses inside parentheses. One level composes a dimension of axes.")
            group = []
        elif token == ")":
            if not group:
                raise wrong(token, "')' closes nothing. A composed dimension is written '(g k)'.")
            dims.append(tuple(group))
            group = None
        elif token.endswith("?") and what != "over":
            raise wrong(token, f"{token!r}: '?' marks a mapped axis that may be absent and belongs in over.")
        elif group is not None:
            if token == ELLIPSIS:
                raise wrong(token, "'...' inside parentheses. Name the axes that compose a dimension.")
            group.append(token)
        else:
            dims.append((token,))
    if group is not None:
        raise wrong("(", "'(' is never closed.")
    seen: set[str] = set()
    for name in (name.rstrip("?") for dim in dims for name in dim):
        if name in seen:
            more = "at most one '...' is allowed" if name == ELLIPSIS else f"the name {name!r} is repeated"
            raise wrong(name, f"{more}. Every axis has a name of its own.")
        seen.add(name)
    return tuple(dims)


def parse(names: Names, what: str = "layout") -> Dims:
    """The dimensions that a layout names.

    >>> parse("n ... (g k)")
    (('n',), ('...',), ('g', 'k'))
    """
    if not isinstance(names, str) and not (isinstance(names, tuple) and all(isinstance(n, str) for n in names)):
        raise LayoutError(f"{what} must be a string of names or a tuple of strings, got {names!r}.")
    return _parse(text_of(names), what)


def flat(dims: Dims) -> tuple[str, ...]:
    return tuple(name for dim in dims for name in dim)


def parse_list(names: Names, what: str) -> tuple[str, ...]:
    """Like `parse` for a plain list of names, where a composed dimension has no meaning."""
    dims = parse(names, what)
    for dim in dims:
        if len(dim) > 1:
            raise LayoutError(
                f"{what} is a list of names: write the parts of ({' '.join(dim)}) without parentheses.\n"
                + point(text_of(names), dim[0], what)
            )
    return flat(dims)


def averaged(layout: Names, over: Names) -> tuple[str, ...]:
    """The names of `layout` that `over` averages, in the order of the layout."""
    listed = {name.rstrip("?") for name in parse_list(over, "over")}
    return tuple(name for name in flat(parse(layout)) if name in listed)


def kept(layout: Names, over: Names) -> tuple[str, ...]:
    """The names of `layout` that `over` leaves, in the order of the layout."""
    gone = averaged(layout, over)
    return tuple(name for name in flat(parse(layout)) if name not in gone)


def last(layout: Names) -> str:
    """The last dimension of the layout that is not `...`, whole where it is composed."""
    for dim in reversed(parse(layout)):
        if dim != (ELLIPSIS,):
            return dim[0] if len(dim) == 1 else f"({' '.join(dim)})"
    return ELLIPSIS


def first(layout: Names) -> str:
    """The first name of the layout, which a norm takes for the examples: a plain one, and not `...`."""
    dims = parse(layout)
    if not dims or len(dims[0]) > 1 or dims[0] == (ELLIPSIS,):
        raise LayoutError(f'the first dimension of the layout "{text_of(layout)}" must be one name, the examples.')
    return flat(dims)[0]


def channels(layout: Names, over: Names) -> str:
    """The one axis that `over` leaves: the channels, wherever in the layout they stand."""
    names = kept(layout, over)
    if len(names) != 1 or names == (ELLIPSIS,):
        raise LayoutError(
            f'over="{text_of(over)}" must leave one axis of the layout "{text_of(layout)}", the channels, and leaves '
            f"{' and '.join(map(repr, names)) or 'none'}."
        )
    return names[0]


def split_axis(layout: Names, axis: str) -> tuple[tuple[str, ...], str, str]:
    """One plain axis of a layout in groups. Gives the layout, its new dimension and the name of a group's members.

    >>> split_axis("n ... c", "c")
    (('n', '...', '(c_group c_member)'), '(c_group c_member)', 'c_member')
    """
    dims = parse(layout)
    if (axis,) not in dims:
        raise LayoutError(f'features={axis!r} must be one plain axis of the layout "{text_of(layout)}": it is split.')
    split = f"({axis}_group {axis}_member)"
    text = (dim[0] if len(dim) == 1 else f"({' '.join(dim)})" for dim in dims)
    return tuple(split if dim == axis else dim for dim in text), split, f"{axis}_member"


def after_first(layout: Names, axis: str) -> tuple[str, ...]:
    """What group norm averages beside the group: all but the first name, which is the examples, and `axis`."""
    names = flat(parse(layout))
    if names[0] in (axis, ELLIPSIS):
        raise LayoutError(
            f"group norm leaves the first name of the layout apart, the examples. In \"{text_of(layout)}\" that is "
            f"{names[0]!r}: name another first, or write the row with standardize and over."
        )
    return tuple(name for name in names[1:] if name != axis)


@dataclasses.dataclass(frozen=True)
class Frame:
    """A layout that has met a shape: `names` and `sizes` of the split axes, `parts` of every dimension.

    `given` is what the user wrote, for messages; `open` whether the layout has a `...`, be it for no dimension.
    """

    given: str
    open: bool
    shape: tuple[int, ...]
    parts: tuple[tuple[int, ...], ...]
    names: tuple[str, ...]
    sizes: tuple[int, ...]

    @property
    def ellipsis(self) -> tuple[str, ...]:
        return tuple(name for name in self.names if name.startswith(ELLIPSIS))

    def size(self, name: str) -> int:
        return self.sizes[self.names.index(name)]

    def expand(self, names: tuple[str, ...]) -> tuple[str, ...]:
        """Names with `...` replaced by the dimensions it stands for here."""
        return tuple(n for name in names for n in (self.ellipsis if name == ELLIPSIS else (name,)))

    def fold(self, names: tuple[str, ...]) -> tuple[str, ...]:
        """The inverse of `expand`: axes as the user wrote them. `...` stays even where it stands for nothing."""
        folded: list[str] = []
        for name in names:
            name = ELLIPSIS if name.startswith(ELLIPSIS) else name
            if name not in folded:
                folded.append(name)
        return tuple(folded)

    def split(self, x: jax.Array) -> jax.Array:
        """Composed dimensions of `x` taken apart. A dimension of size 1 (of a mask) splits into ones."""
        if len(self.names) == len(self.shape):
            return x
        for dim, parts in enumerate(self.parts):
            lies = parts_of(jax.typeof(x).sharding, dim)
            if len(parts) > 1 and parts[0] % lies:
                raise LayoutError(
                    f"a dimension of size {x.shape[dim]} lies in {lies} parts on the devices and cannot be split into "
                    f"{' x '.join(map(str, parts))} there: {parts[0]} is not a multiple of {lies}. Gather it first "
                    f"with jax.reshard, or choose other sizes.\n{self.given}"
                )
        return x.reshape([s for n, p in zip(x.shape, self.parts, strict=True) for s in (p if n != 1 else [1] * len(p))])

    def join(self, y: jax.Array) -> jax.Array:
        return y if y.shape == self.shape else y.reshape(self.shape)


def meet(
    layout: Names,
    shape: tuple[int, ...],
    sizes: Mapping[str, int] | None = None,
    over: Names | None = None,
    what: str = "x",
) -> Frame:
    """Give every dimension of a shape its name, or say why it cannot be done.

    >>> frame = meet("n ... (g k)", (2, 5, 5, 6), {"g": 3})
    >>> frame.names, frame.sizes
    (('n', '...0', '...1', 'g', 'k'), (2, 5, 5, 3, 2))
    """
    if sizes is not None and not isinstance(sizes, Mapping):
        raise LayoutError(f"sizes must be a dict of names to integers, got {sizes!r}.")
    dims, text, sizes = parse(layout), text_of(layout), dict(sizes or {})
    given = f'  layout "{text}", ' + ("" if over is None else f'over "{text_of(over)}", ') + f"{what}.shape {shape}"
    given += f", sizes {sizes}" if sizes else ""
    for name, size in sizes.items():
        if name not in flat(dims):
            raise LayoutError(f"sizes names {name!r}, which is not in the layout.{nearest(name, flat(dims))}\n{given}")
        if isinstance(size, bool) or not isinstance(size, Integral) or size < 1:
            raise LayoutError(f"sizes[{name!r}] must be a positive integer, got {size!r}.\n{given}")
    if (ELLIPSIS,) in dims:
        extra = len(shape) - (len(dims) - 1)
        at = dims.index((ELLIPSIS,))
        if extra >= 0:
            dims = dims[:at] + tuple((f"{ELLIPSIS}{i}",) for i in range(extra)) + dims[at + 1 :]
    if len(dims) != len(shape):
        few = "at least " if ELLIPSIS in flat(dims) else ""
        count = len(dims) - bool(few)
        raise LayoutError(f"the layout names {few}{count} dimensions, {what} has {len(shape)}.\n{given}")
    parts = tuple(_parts(dim, size, sizes, given) for dim, size in zip(dims, shape, strict=True))
    whole = tuple(size for sizes in parts for size in sizes)
    return Frame(given, ELLIPSIS in flat(parse(layout)), tuple(shape), parts, flat(dims), whole)


def _parts(dim: tuple[str, ...], size: int, sizes: dict[str, int], given: str) -> tuple[int, ...]:
    """The sizes of the axes that compose one dimension: all but one must be given."""
    missing = [name for name in dim if name not in sizes]
    known = math.prod(sizes[name] for name in dim if name in sizes)
    whole = f"({' '.join(dim)})" if len(dim) > 1 else "".join(dim)
    if len(missing) > 1:
        raise LayoutError(
            f"the sizes of {whole} are not known: give all but one of them, as in sizes={{{missing[0]!r}: ...}}."
            f"\n{given}"
        )
    if (missing and size % known) or (not missing and size != known):
        product = " * ".join([f"{name}={sizes[name]}" for name in dim if name in sizes] + missing)
        raise LayoutError(f"{whole} has size {size}, which is not {product}. Change sizes.\n{given}")
    return tuple(sizes[name] if name in sizes else size // known for name in dim)


def place(array: jax.Array, names: tuple[str, ...], frame: Frame, what: str) -> jax.Array:
    """Broadcast by name: `array`, laid out along `names`, with the frame's rank and size 1 where it has no axis."""
    for name, size in zip(names, array.shape, strict=True):
        if name not in frame.names:
            raise LayoutError(
                f"{what} is laid out along {frame.fold((name,))[0]!r}, which the layout lacks."
                f"{nearest(name, frame.names)}\n"
                f'  {what} along "{" ".join(frame.fold(names))}"\n{frame.given}'
            )
        if size != frame.size(name):
            raise LayoutError(
                f"{what} has {size} entries along {name!r}, the array has {frame.size(name)}.\n"
                f'  {what} along "{" ".join(frame.fold(names))}" with shape {array.shape}\n{frame.given}'
            )
    order = sorted(range(len(names)), key=lambda i: frame.names.index(names[i]))
    shape = [size if name in names else 1 for name, size in zip(frame.names, frame.sizes, strict=True)]
    return jnp.transpose(array, order).reshape(shape)


def place_features(array: jax.Array, features: Names, frame: Frame, what: str) -> jax.Array:
    """`place` for scale and bias. A composed dimension may be given whole or in its parts."""
    dims: list[tuple[str, ...]] = []
    for dim in parse(features, "features"):
        dims.extend([(name,) for name in frame.ellipsis] if dim == (ELLIPSIS,) else [dim])
    for name in flat(tuple(dims)):
        if name not in frame.names:
            raise LayoutError(
                f"{what} is laid out along {name!r}, which the layout lacks.{nearest(name, frame.names)}\n"
                f"{point(text_of(features), name, 'features')}\n{frame.given}"
            )
    names = flat(tuple(dims))
    apart = tuple(frame.size(name) for name in names)
    whole = tuple(math.prod(frame.size(name) for name in dim) for dim in dims)
    if array.shape not in (apart, whole):
        raise LayoutError(
            f'{what} has shape {array.shape}, its features "{text_of(features)}" have {whole}.\n{frame.given}'
        )
    return place(array.reshape(apart), names, frame, what)
