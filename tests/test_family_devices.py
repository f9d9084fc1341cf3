"""The family on several devices: vmap with an axis name, shard_map, pmap, and jit over sharded arrays."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from family import CASES, C, H, N, arrays
from jax.sharding import PartitionSpec as P
from test_collectives import COLLECTIVE
from test_family import alone, close, every_case

import jaxnorm as jn

sharded_cases = pytest.mark.parametrize(
    "case", [case for case in CASES if case.sharded is not None], ids=lambda case: case.name
)



def cut(z, dim):
    """A leading axis of two devices out of dimension `dim`: uneven parts are what the mask makes of it."""
    return np.stack(np.split(z, 2, dim))


def lies_along(name, z, sharded):
    """The dimension of a parameter that is cut where dimension `sharded` of x is."""
    if z.shape == (N, H, C):
        return sharded
    if name.startswith("rows"):  # [n, c]
        return {0: 0, 2: 1}.get(sharded)
    return 0 if sharded == 2 and z.ndim == 1 else None


@sharded_cases
def test_devices(case):
    """Two devices under vmap, the second with a few entries that count or none: numbers, state and gradients of one."""
    x, p, mask, cotangent = case.sample()
    size = x.shape[case.sharded]
    if size % 2:  # H is odd
        x, mask, cotangent = (None if z is None else np.concatenate([z, z], case.sharded) for z in (x, mask, cotangent))
        size *= 2
    masks = [None]
    if case.masks:
        second = np.arange(size).reshape([-1 if d == case.sharded else 1 for d in range(3)]) >= size // 2
        masks += [mask & ~second | (mask & (np.arange(C) == 0)), mask & ~second]

    def loss(x, p, mask, w):
        y, state = case.ours(x, p, case.state, mask, lambda names: f"{names} devices")
        return jax.lax.psum(jnp.sum(y * w), "devices"), (y, state)

    def step(x, p, mask, w):
        return jax.value_and_grad(loss, (0, 1), has_aux=True)(x, p, mask, w)

    dims = {name: lies_along(name, z, case.sharded) for name, z in p.items()}
    cut_p = {name: z if dims[name] is None else cut(z, dims[name]) for name, z in p.items()}
    axes = {name: None if dim is None else 0 for name, dim in dims.items()}

    @jax.jit
    def everything(x, p, w):
        run = jax.vmap(step, (0, axes, 0, 0), axis_name="devices")
        return [run(x, p, mask if mask is None else cut(mask, case.sharded), w) for mask in masks]

    @jax.jit
    def whole(x, p):
        def one(x, p, mask):
            y, state = case.ours(x, p, case.state, mask, alone)
            return jnp.sum(y * cotangent), (y, state)

        return [jax.value_and_grad(one, (0, 1), has_aux=True)(x, p, mask) for mask in masks]

    def joined(z):
        return np.concatenate(list(np.asarray(z)), case.sharded)

    results = everything(cut(x, case.sharded), cut_p, cut(cotangent, case.sharded))
    for mask, result, wanted in zip(masks, results, whole(x, p), strict=True):
        ((_, (y, state)), (dx, dp)), ((_, (one, kept)), (dx1, dp1)) = result, wanted
        if case.name != "ghost batch":  # its ghosts are each device's own
            close(joined(y), case.paper(x, p, arrays(case.state), mask)[0], **case.close)
        close(joined(y), one)
        for found, wanted in zip(jax.tree.leaves(state), jax.tree.leaves(kept), strict=True):
            for device in found:
                close(device, wanted, rtol=1e-5, atol=1e-5 * max(1, np.abs(wanted).max(initial=0)))
        # vmap gives each device's own gradient of the summed loss, n times over: psum's transpose is a psum
        close(joined(dx) / 2, dx1, rtol=1e-5, atol=1e-5)
        for name in p:
            parts = np.asarray(dp[name])
            total = parts.sum(0) if dims[name] is None else np.concatenate(list(parts), dims[name])
            close(total / 2, dp1[name], rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("kind", ["check_vma", "no check_vma", "pmap"])
@pytest.mark.parametrize(
    "case", [case for case in CASES if case.sharded == 0 and case.name != "SPADE"], ids=lambda case: case.name
)
def test_mesh(case, kind):
    """State leaves shard_map replicated; numbers and gradients are those of one device."""
    x, p, mask, cotangent = case.sample()
    mesh = jax.make_mesh((2,), ("devices",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:2])

    def step(x, p, w, mask):
        def loss(x, p):
            y, state = case.ours(x, p, case.state, mask, lambda names: f"{names} devices")
            return jnp.sum(y * w), (y, state)

        (dx, dp), (y, state) = jax.grad(loss, (0, 1), has_aux=True)(x, p)
        return y, dx, state, jn.reduce_gradients(dp, "devices")

    if kind == "pmap":
        run = jax.pmap(step, "devices", in_axes=(0, None, 0, 0), devices=jax.devices()[:2])
        parts = (z.reshape(2, N // 2, H, C) for z in (x, cotangent, mask))
        y, dx, *rest = run(next(parts), p, *parts)
        (y, dx), rest = (np.asarray(z).reshape(case.shape) for z in (y, dx)), jax.tree.map(lambda z: z[1], rest)
    else:
        specs = P("devices"), P(), P("devices"), P("devices")
        out = P("devices"), P("devices"), P(), P()
        run = jax.shard_map(step, mesh=mesh, in_specs=specs, out_specs=out, check_vma=kind == "check_vma")
        y, dx, *rest = jax.jit(run)(x, p, cotangent, mask)

    def whole(x, p):
        y, state = case.ours(x, p, case.state, mask, alone)
        return jnp.sum(y * cotangent), state

    (dx1, dp1), state = jax.jit(jax.grad(whole, (0, 1), has_aux=True))(x, p)
    close(y, case.paper(x, p, arrays(case.state), mask)[0], **case.close)
    for found, wanted in zip(jax.tree.leaves((dx, rest)), jax.tree.leaves((dx1, [state, dp1])), strict=True):
        close(found, wanted, rtol=1e-5, atol=1e-5 * max(1, np.abs(wanted).max()))


@pytest.mark.parametrize("kind", [jax.sharding.AxisType.Auto, jax.sharding.AxisType.Explicit], ids=["Auto", "Explicit"])
@pytest.mark.parametrize("masked", [False, True])
@every_case
def test_jit_over_sharded_examples(case, masked, kind):
    """No name in `over`: the numbers are those of the whole batch."""
    x, p, mask, cotangent = case.sample()
    mask = mask if masked else None
    mesh = jax.make_mesh((2,), ("devices",), axis_types=(kind,), devices=jax.devices()[:2])
    rows, whole = jax.NamedSharding(mesh, P("devices")), jax.NamedSharding(mesh, P())
    if case.shape[0] != N:  # a kernel
        rows = jax.NamedSharding(mesh, P(None, None, "devices"))

    def step(x, p, w, mask):
        def loss(x, p):
            y, state = case.ours(x, p, case.state, mask, alone)
            return jnp.sum(y * w), (y, state)

        return jax.grad(loss, (0, 1), has_aux=True)(x, p)

    with jax.set_mesh(mesh):
        placed = jax.device_put((x, cotangent, mask), rows)
        (dx, dp), (y, state) = jax.jit(step)(placed[0], jax.device_put(p, whole), *placed[1:])
    expected, carried = case.paper(x, p, arrays(case.state), mask)
    close(y, expected, **case.close)
    for found, wanted in zip(arrays(state), carried or (), strict=True):
        close(found, wanted)
    (dx1, dp1), _ = jax.jit(step)(x, p, cotangent, mask)
    for found, wanted in zip(jax.tree.leaves((dx, dp)), jax.tree.leaves((dx1, dp1)), strict=True):
        close(found, wanted, rtol=1e-5, atol=1e-5 * max(1, np.abs(wanted).max()))


@pytest.mark.parametrize(
    "case", [case for case in CASES if case.sharded == 0 and case.name != "SPADE"], ids=lambda case: case.name
)
def test_collectives(case):
    """One forward; two where statistics are of two kinds: a mean and a covariance, moments and their derivatives."""
    x, p, mask, _ = case.sample()
    mesh = jax.make_mesh((2,), ("devices",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:2])
    step = jax.shard_map(
        lambda x, mask: case.ours(x, p, case.state, mask, lambda names: f"{names} devices"), mesh=mesh,
        in_specs=(P("devices"), P("devices")), out_specs=(P("devices"), P()),
    )  # fmt: skip
    two = case.name in ("decorrelated batch", "iterative", "cross-iteration batch")
    assert len(COLLECTIVE.findall(jax.jit(step).lower(x, mask).compile().as_text())) == 1 + two
