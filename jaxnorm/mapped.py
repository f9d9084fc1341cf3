"""Mapped axes: those that vmap, pmap and shard_map put around a call, and the collectives over them.

A name in `over` that is no dimension of `x` is one of these. Statistics cross them in one collective: an all-gather
of every device's moments, merged locally after Chan. That, and not a psum of sums, because only a merge of centred
statistics keeps its digits in one collective: at mean 1e4 and std 1, on 2 to 64 devices, its relative variance error is
2e-7; that of one psum of raw sums is 60, of one psum about a shift 1 % off 8e-3, of two psums 7e-6
(`benchmarks/sync_cost.py`). The price is that what is received grows with the devices. Linear maps (tangents) are
summed with one psum, whose transpose JAX knows.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxnorm.errors import AxisError, LayoutError, nearest, point
from jaxnorm.layout import ELLIPSIS, Frame, Names, parse_list, text_of

Groups = Mapping[str, Sequence[Sequence[int]]]


@dataclasses.dataclass(frozen=True)
class Mapped:
    """Mapped axes to reduce over together, the devices along them, and the one that is cut into groups, if any.

    Hashable and computed outside every derivative rule: JAX may trace a rule where the names are not bound.
    """

    names: tuple[str, ...] = ()
    size: int = 1
    grouped: str | None = None
    length: int = 1  # of the axis that is cut, and how far its devices lie apart in the order of `gather`
    stride: int = 1

    def gather(self, z: jax.Array) -> jax.Array:
        """The values of all devices, stacked on a new leading axis; the same array on each of them."""
        mesh, vmapped = _by_kind(self.names)
        shape = z.shape
        if mesh:  # typed as replicated, so that state computed from it leaves shard_map with out_specs=P()
            z = lax.all_gather(z, mesh, to="invarying")
        for name in vmapped:
            z = lax.all_gather(z, name)
        return z.reshape((self.size, *shape))

    def total(self, z: jax.Array, member: jax.Array | None) -> jax.Array:
        """The sum over all devices, or over this device's group. Linear, and differentiable in both modes."""
        if not self.names:
            return z
        if member is None:
            return lax.psum(z, self.names)
        # The axes that are not cut first, by a psum: its result is typed as replicated over them, like the statistics.
        others = tuple(name for name in self.names if name != self.grouped)
        z = lax.psum(z, others) if others else z
        own = member.reshape(-1, self.length, self.stride)[0, :, 0].astype(z.dtype)
        return jnp.tensordot(own, lax.all_gather(z, self.grouped), 1)

    def member(self, groups: Groups | None) -> jax.Array | None:
        """1 for the devices of this device's own group and 0 for the others, in the order of `gather`."""
        if self.grouped is None or groups is None:
            return None
        group_of = np.zeros(self.length, np.int32)
        for i, group in enumerate(groups[self.grouped]):
            group_of[list(group)] = i
        table = np.tile(np.repeat(group_of, self.stride), self.size // (self.length * self.stride))
        own = jnp.asarray(group_of)[lax.axis_index(self.grouped)]
        return (jnp.asarray(table) == own).astype(jnp.float32)


def _by_kind(names: tuple[str, ...]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Names bound by a mesh (pmap, shard_map), names bound by vmap. They need different forms of all_gather."""
    manual = jax.sharding.get_abstract_mesh().manual_axes
    return tuple(n for n in names if n in manual), tuple(n for n in names if n not in manual)


def varying(x: jax.Array) -> frozenset[str]:
    """The mesh axes that `x` is known to vary over. Under check_vma=False that is none of them, whatever `x` is."""
    kind = jax.typeof(x)
    now = getattr(kind, "mat", None)  # jax 0.12 and later; before, `vma`
    return frozenset(now.varying if now is not None else getattr(kind, "vma", None) or ())


def varying_over(x: jax.Array, names: tuple[str, ...]) -> tuple[str, ...]:
    """Those of the mapped axes `names` over which x may differ. JAX knows under check_vma=True only."""
    if not checks_vma():
        return names
    known = varying(x)
    return tuple(name for name in names if name in known)


def checks_vma() -> bool:
    """Whether the call is inside shard_map(check_vma=True): there, and only there, an axis index is known to vary."""
    manual = jax.sharding.get_abstract_mesh().manual_axes
    return bool(manual) and bool(varying(lax.axis_index(manual[0])))


def is_mapped(name: str) -> bool:
    try:
        lax.axis_size(name)
    except NameError:
        return False
    return True


def bound_names() -> tuple[str, ...]:
    """The mapped axes around the call, for messages only: JAX has no public way to list the names that vmap binds."""
    from jax.extend import core

    listed = getattr(core, "unsafe_get_axis_names_DO_NOT_USE", tuple)()
    manual = jax.sharding.get_abstract_mesh().manual_axes
    return tuple(dict.fromkeys(str(name) for name in (*manual, *listed)))


def resolve_over(over: Names, frame: Frame, groups: Groups | None = None) -> tuple[tuple[int, ...], Mapped]:
    """Which dimensions `over` averages, and which mapped axes."""
    names = parse_list(over, "over")
    text = text_of(over)
    if not names:
        raise AxisError(f"over is empty: name the axes whose elements are averaged together.\n{frame.given}")
    dims: list[int] = []
    mapped: list[str] = []
    for listed in names:
        name, optional = listed.rstrip("?"), listed.endswith("?")
        inside = frame.expand((name,))
        if name == ELLIPSIS and not frame.open:
            raise LayoutError(f"over names '...', the layout has none: name the dimensions to average.\n{frame.given}")
        if name == ELLIPSIS or name in frame.names:
            if name in frame.names and is_mapped(name):
                raise AxisError(
                    f"{name!r} is both a dimension of the layout and a mapped axis. Rename one of them.\n"
                    f"{point(text, name, 'over')}\n{frame.given}"
                )
            dims.extend(frame.names.index(n) for n in inside)
        elif is_mapped(name):
            mapped.append(name)
        elif not optional:
            raise _unbound(name, text, frame)
    return tuple(dims), _mapped(tuple(mapped), text, groups)


def resolve_axes(over: Names) -> Mapped:
    """`over` where there is no array whose dimensions it could name: mapped axes only."""
    names, text = parse_list(over, "over"), text_of(over)
    if not names:
        raise AxisError('over is empty: name the mapped axes, as in over="devices".')
    there = []
    for listed in names:
        name = listed.rstrip("?")
        if is_mapped(name):
            there.append(name)
        elif not listed.endswith("?"):
            raise _unbound(name, text)
    return _mapped(tuple(there), text, None)


def _unbound(name: str, text: str, frame: Frame | None = None) -> AxisError:
    bound = bound_names()
    dims = () if frame is None else tuple(n for n in frame.names if not n.startswith(ELLIPSIS))
    kind = "no mapped axis" if frame is None else "neither a dimension of the layout nor a mapped axis"
    given = "" if frame is None else f"{frame.given}\n"
    return AxisError(
        f"{name!r} in over is {kind}.{nearest(name, (*dims, *bound))}\n"
        f"{point(text, name, 'over')}\n{given}  mapped axes bound here: {', '.join(bound) or 'none'}\n"
        f"  Put the call under vmap(..., axis_name={name!r}), pmap or shard_map, or write {name + '?'!r} to skip the "
        "axis where it is absent. Under jit over sharded arrays leave it out: statistics are global there."
    )


def _mapped(names: tuple[str, ...], text: str, groups: Groups | None) -> Mapped:
    manual = jax.sharding.get_abstract_mesh().manual_axes
    for name in names:
        if name not in manual and checks_vma():
            raise AxisError(
                f"{name!r} is an axis of vmap inside shard_map(check_vma=True), where JAX cannot reduce over it. "
                "Make it a dimension of the layout (no vmap), or pass check_vma=False to shard_map.\n"
                + point(text, name, "over")
            )
    size = 1
    for name in names:
        size *= lax.axis_size(name)
    grouped = None
    if groups is not None and not isinstance(groups, Mapping):
        raise AxisError(f'groups must be a dict, as {{"devices": [[0, 1], [2, 3]]}}, got {groups!r}.')
    for name, parts in (groups or {}).items():
        if name not in text.replace("?", "").split():
            raise AxisError(f'groups names {name!r}, which is not in over.{nearest(name, names)}\n  over "{text}"')
        if name not in names and f"{name}?" in text.split():
            continue  # an optional axis that is absent here
        if name not in names:
            raise AxisError(f'groups names {name!r}, a dimension: groups are of mapped axes.\n  over "{text}"')
        if grouped is not None:
            raise AxisError(f"groups cuts {grouped!r} and {name!r}: only one mapped axis can be cut into groups.")
        if sorted(i for part in parts for i in part) != list(range(lax.axis_size(name))):
            raise AxisError(
                f"groups[{name!r}] = {[list(part) for part in parts]} must hold every index of the axis, "
                f"0 to {lax.axis_size(name) - 1}, exactly once."
            )
        grouped = name
    if grouped is None:
        return Mapped(names, size)
    mesh, vmapped = _by_kind(names)
    order = (*reversed(vmapped), *mesh)  # gather stacks its last axis outermost
    stride = math.prod(lax.axis_size(name) for name in order[order.index(grouped) + 1 :])
    return Mapped(names, size, grouped, lax.axis_size(grouped), stride)
