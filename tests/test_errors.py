"""Wrong calls and what they are told, word for word: which call, what it was given, which name, what to do."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import jaxnorm as jn

X = jnp.ones((2, 4, 5, 6))
GIVEN = 'layout "n h w c", over "n h w", x.shape (2, 4, 5, 6)'


def under_vmap(call):
    return jax.vmap(call, axis_name="devices")(X)


def under_shard_map_and_vmap():
    mesh = jax.make_mesh((8,), ("devices",), axis_types=(AxisType.Auto,))
    inner = jax.vmap(lambda x: jn.moments(x, "n c", "n member").mean, axis_name="member")
    return jax.shard_map(inner, mesh=mesh, in_specs=P("devices"), out_specs=P("devices"))(jnp.ones((16, 3, 4)))


WRONG = [
    (
        "unknown name",
        lambda: jn.moments(X, "n h w c", "n hh w"),
        jn.AxisError,
        """jaxnorm.moments: 'hh' in over is neither a dimension of the layout nor a mapped axis. Did you mean 'h'?
  over "n hh w"
          ^^
  layout "n h w c", over "n hh w", x.shape (2, 4, 5, 6)
  mapped axes bound here: none
  Put the call under vmap(..., axis_name='hh'), pmap or shard_map, or write 'hh?' to skip the axis where it is absent. """
        "Under jit over sharded arrays leave it out: statistics are global there.",
    ),
    (
        "misspelt mapped axis",
        lambda: under_vmap(lambda x: jn.batch_norm(x, jn.running_stats(c=6), "h w c", "h w devies")),
        jn.AxisError,
        """jaxnorm.batch_norm: 'devies' in over is neither a dimension of the layout nor a mapped axis. Did you mean 'devices'?
  over "h w devies"
            ^^^^^^
  layout "h w c", over "h w devies", x.shape (4, 5, 6)
  mapped axes bound here: devices
  Put the call under vmap(..., axis_name='devies'), pmap or shard_map, or write 'devies?' to skip the axis where it is absent. """
        "Under jit over sharded arrays leave it out: statistics are global there.",
    ),
    (
        "repeated name",
        lambda: jn.layer_norm(X, "n h h c"),
        jn.LayoutError,
        """jaxnorm.layer_norm: layout cannot be read: the name 'h' is repeated. Every axis has a name of its own.
  layout "n h h c"
              ^""",
    ),
    (
        "repeated in over",
        lambda: jn.moments(X, "n h w c", "n h n"),
        jn.LayoutError,
        """jaxnorm.moments: over cannot be read: the name 'n' is repeated. Every axis has a name of its own.
  over "n h n"
            ^""",
    ),
    (
        "two ellipses",
        lambda: jn.standardize(X, "... h ... c"),
        jn.LayoutError,
        """jaxnorm.standardize: layout cannot be read: at most one '...' is allowed. Every axis has a name of its own.
  layout "... h ... c"
                ^^^""",
    ),
    (
        "not a name",
        lambda: jn.moments(X, "n h-w c", "n"),
        jn.LayoutError,
        """jaxnorm.moments: layout cannot be read: '-' is not a name. Use names (letters, digits, _), '...' and one level of ().
  layout "n h-w c"
             ^""",
    ),
    (
        "nested parentheses",
        lambda: jn.moments(X, "n h w (g (k))", "n"),
        jn.LayoutError,
        """jaxnorm.moments: layout cannot be read: parentheses inside parentheses. One level composes a dimension of axes.
  layout "n h w (g (k))"
                   ^""",
    ),
    (
        "open parenthesis",
        lambda: jn.moments(X, "n h w (g k", "n"),
        jn.LayoutError,
        """jaxnorm.moments: layout cannot be read: '(' is never closed.
  layout "n h w (g k"
                ^""",
    ),
    (
        "too few dimensions",
        lambda: jn.moments(X, "n h c", "n"),
        jn.LayoutError,
        """jaxnorm.moments: the layout names 3 dimensions, x has 4.
  layout "n h c", over "n", x.shape (2, 4, 5, 6)""",
    ),
    (
        "sizes missing",
        lambda: jn.moments(X, "n h w (g k)", "n k"),
        jn.LayoutError,
        """jaxnorm.moments: the sizes of (g k) are not known: give all but one of them, as in sizes={'g': ...}.
  layout "n h w (g k)", over "n k", x.shape (2, 4, 5, 6)""",
    ),
    (
        "sizes that do not multiply",
        lambda: jn.moments(X, "n h w (g k)", "n k", sizes={"g": 2, "k": 4}),
        jn.LayoutError,
        """jaxnorm.moments: (g k) has size 6, which is not g=2 * k=4. Change sizes.
  layout "n h w (g k)", over "n k", x.shape (2, 4, 5, 6), sizes {'g': 2, 'k': 4}""",
    ),
    (
        "groups that do not divide",
        lambda: jn.group_norm(X, 4),
        jn.LayoutError,
        "jaxnorm.group_norm: num_groups=4 does not divide the 6 entries along 'c'.",
    ),
    (
        "scale of the wrong shape",
        lambda: jn.layer_norm(X, scale=jnp.ones(5)),
        jn.LayoutError,
        """jaxnorm.layer_norm: scale has shape (5,), its features "c" have (6,).
  layout "... c", over "c", x.shape (2, 4, 5, 6)""",
    ),
    (
        "scale along an axis the layout lacks",
        lambda: jn.standardize(X, "n h w c", "n h w", bias=jnp.ones(6), features="channels"),
        jn.LayoutError,
        f"""jaxnorm.standardize: bias is laid out along 'channels', which the layout lacks.
  features "channels"
            ^^^^^^^^
  {GIVEN}""",
    ),
    (
        "moments along an axis the layout lacks",
        lambda: jn.normalize(X, jn.running_stats("cc", cc=6), "n h w c"),
        jn.LayoutError,
        """jaxnorm.normalize: stats is laid out along 'cc', which the layout lacks. Did you mean 'c'?
  stats along "cc"
  layout "n h w c", x.shape (2, 4, 5, 6)""",
    ),
    (
        "moments of another size",
        lambda: jn.normalize(X, jn.running_stats(c=5), "n h w c"),
        jn.LayoutError,
        """jaxnorm.normalize: stats has 5 entries along 'c', the array has 6.
  stats along "c" with shape (5,)
  layout "n h w c", x.shape (2, 4, 5, 6)""",
    ),
    (
        "running statistics along what is averaged",
        lambda: jn.batch_norm(X, jn.running_stats(c=6), "n h w c", "n h w c"),
        jn.LayoutError,
        """jaxnorm.batch_norm: the running statistics are kept along 'c', which the moments lack.
  running along ('c',), moments along (): averaged too much? See over.""",
    ),
    (
        "statistics that are none",
        lambda: jn.normalize(X, (0.0, 1.0)),
        ValueError,
        "jaxnorm.normalize: stats must be Moments or RunningStats, got tuple.",
    ),
    (
        "mask that does not broadcast",
        lambda: jn.standardize(X, "n h w c", "n h w", mask=jnp.ones((2, 4), bool)),
        jn.LayoutError,
        f"""jaxnorm.standardize: mask of shape (2, 4) does not broadcast to x. Give it the dimensions of x, with size 1 where it does not vary.
  {GIVEN}""",
    ),
    (
        "mask of more dimensions than x",
        lambda: jn.standardize(X, "n h w c", "n h w", mask=jnp.ones((1, 2, 4, 5, 6), bool)),
        jn.LayoutError,
        f"""jaxnorm.standardize: mask of shape (1, 2, 4, 5, 6) does not broadcast to x. Give it the dimensions of x, with size 1 where it does not vary.
  {GIVEN}""",
    ),
    (
        "mask that fits twice",
        lambda: jn.standardize(X[0, 0, :, :5], "n c", "n", mask=jnp.ones(5, bool)),
        jn.LayoutError,
        """jaxnorm.standardize: mask of shape (5,) fits the first dimensions of x, and the last ones too. Give it all dimensions of x, with size 1 where it does not vary.
  layout "n c", over "n", x.shape (5, 5)""",
    ),
    (
        "batch of one",
        lambda: under_vmap(lambda x: jn.batch_norm(x[0, 0], jn.running_stats(c=6), "c", "devises?")),
        ValueError,
        """jaxnorm.batch_norm: every statistic would be of one element, y bias and the running variance 0.
  layout "c", over "devises?", x.shape (6,)
  mapped axes bound here: devices
  Train on more examples; or name the mapped axis along which they lie in over (Flax: axis_name); or normalize with the running statistics (use_running_average=True); or take group_norm.""",
    ),
    (
        "float mask",
        lambda: jn.standardize(X, "n h w c", "n h w", mask=jnp.ones(X.shape)),
        jn.LayoutError,
        f"""jaxnorm.standardize: mask has dtype float32: pass how much an element counts as weights=, not mask=.
  {GIVEN}""",
    ),
    (
        "integer input",
        lambda: jn.layer_norm(X.astype(jnp.int32)),
        jn.LayoutError,
        "jaxnorm.layer_norm: x has dtype int32, and statistics of integers are no integers. Convert it first, as in "
        "x.astype(jnp.float32). Its shape is (2, 4, 5, 6).",
    ),
    (
        "no array",
        lambda: jn.rms_norm(None),
        jn.LayoutError,
        "jaxnorm.rms_norm: x must be an array, got NoneType.",
    ),
    (
        "empty over",
        lambda: jn.moments(X, "n h w c", ""),
        jn.AxisError,
        """jaxnorm.moments: over is empty: name the axes whose elements are averaged together.
  layout "n h w c", over "", x.shape (2, 4, 5, 6)""",
    ),
    (
        "... in over alone",
        lambda: jn.batch_norm(X, jn.running_stats(c=6), "n h w c"),
        jn.LayoutError,
        """jaxnorm.batch_norm: over names '...', the layout has none: name the dimensions to average.
  layout "n h w c", over "...", x.shape (2, 4, 5, 6)""",
    ),
    (
        "dimension and mapped axis",
        lambda: under_vmap(lambda x: jn.moments(x, "devices h c", "devices h")),
        jn.AxisError,
        """jaxnorm.moments: 'devices' is both a dimension of the layout and a mapped axis. Rename one of them.
  over "devices h"
        ^^^^^^^
  layout "devices h c", over "devices h", x.shape (4, 5, 6)""",
    ),
    (
        "vmap inside shard_map with check_vma",
        under_shard_map_and_vmap,
        jn.AxisError,
        """jaxnorm.moments: 'member' is an axis of vmap inside shard_map(check_vma=True), where JAX cannot reduce over it. """
        """Make it a dimension of the layout (no vmap), or pass check_vma=False to shard_map.
  over "n member"
          ^^^^^^""",
    ),
    (
        "groups that miss a device",
        lambda: under_vmap(lambda x: jn.moments(x, "h w c", "h devices", groups={"devices": [[0], [0]]})),
        jn.AxisError,
        "jaxnorm.moments: groups['devices'] = [[0], [0]] must hold every index of the axis, 0 to 1, exactly once.",
    ),
    (
        "groups of another axis",
        lambda: under_vmap(lambda x: jn.moments(x, "h w c", "h devices", groups={"device": [[0], [1]]})),
        jn.AxisError,
        """jaxnorm.moments: groups names 'device', which is not in over. Did you mean 'devices'?
  over "h devices\"""",
    ),
    (
        "sizes of a state",
        lambda: jn.running_stats("c d", c=3),
        jn.LayoutError,
        "jaxnorm.running_stats: axes \"c d\" need the sizes c=..., d=..., got {'c': 3}. '...' has no size here.",
    ),
    (
        "merge along different axes",
        lambda: jn.merge(jn.empty_moments("c", c=3), jn.empty_moments("d", d=3)),
        jn.LayoutError,
        "jaxnorm.merge: moments along ('d',) cannot be merged with moments along ('c',): the axes must be the same.",
    ),
    (
        "momentum",
        lambda: jn.batch_norm(X, jn.running_stats(c=6), momentum=1.5),
        ValueError,
        "jaxnorm.batch_norm: momentum is the part of the old value that is kept, 0 to 1, got 1.5.",
    ),
    (
        "momentum 1 with debias",
        lambda: jn.batch_norm(X, jn.running_stats(c=6), momentum=1, debias=True),
        ValueError,
        "jaxnorm.batch_norm: momentum=1 with debias never ends its warm-up. momentum=None is its limit.",
    ),
    (
        "epsilon",
        lambda: jn.layer_norm(X, epsilon=-1e-6),
        ValueError,
        "jaxnorm.layer_norm: epsilon must not be negative, got -1e-06.",
    ),
]  # fmt: skip


@pytest.mark.parametrize(('call', 'kind', 'message'), [row[1:] for row in WRONG], ids=[row[0] for row in WRONG])
def test_message(call, kind, message):
    with pytest.raises(kind) as raised:
        call()
    assert str(raised.value) == message


def test_errors_are_value_errors():
    assert issubclass(jn.LayoutError, ValueError)
    assert issubclass(jn.AxisError, ValueError)


def test_errors_are_raised_when_tracing():
    """Nothing waits for values: the same message under jit, without running anything."""
    with pytest.raises(jn.LayoutError, match="num_groups=4 does not divide"):
        jax.eval_shape(lambda x: jn.group_norm(x, 4), jax.ShapeDtypeStruct((2, 6), jnp.float32))
