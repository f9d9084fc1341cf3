"""The pictures: what is drawn is what the norms do, nothing is shown, nothing leaks."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from matplotlib.figure import Figure

import jaxnorm as jn
from jaxnorm.errors import ArgumentError, LayoutError
from jaxnorm.inspect.cube import cube
from jaxnorm.layout import parse

RNG = np.random.default_rng(0)


# --- the cube


def coloured(axes):
    """How many cells are in a colour, and how many there are."""
    colours = [np.array(patch.get_facecolor()[:3]) for patch in axes.patches]
    return sum(np.ptp(c) > 0.05 for c in colours), len(colours)


# right 4, deep 6, up 4: the faces have 16 cells in front, 24 at the side, 24 on top
FACES = {"front": 4 * 4, "side": 6 * 4, "top": 4 * 6}
CUBES = {  # norm: cells in colour on the front, side and top
    "batch": (16, 4, 4),  # one channel of all examples
    "layer": (1, 6, 6),  # one place of one example, all channels
    "RMS": (1, 6, 6),
    "instance": (4, 4, 1),  # one channel of one example
    "group": (4, 4 * 2, 2),  # two of the six channels
    "ghost batch": (2 * 4, 4, 2),  # half of the examples
    "positional": (1, 6, 6),
    "conditional batch": (16, 4, 4),
    "weight": (4, 24, 6),  # all inputs and places of one output
    "FiLM": (0, 0, 0),  # no statistics
    "dynamic tanh": (0, 0, 0),
}


@pytest.mark.parametrize("name", CUBES)
def test_the_cells_in_colour(name):
    (axes,) = jn.inspect.plot_cube(name).axes
    assert coloured(axes) == (sum(CUBES[name]), sum(FACES.values()))
    assert axes.get_title() == name


LAYOUTS = [  # layout, over, what the mean is for each of
    ("n h w c", "n h w"), ("n h w c", "h w"), ("n h w c", "c"), ("n h w c", "h w c"), ("n c h w", "n h w"),
    ("b t d", "d"), ("n c", "n"), ("c", "c"), ("(m n) h w c", "n h w"), ("n h w (g k)", "h w k"), ("h w i o", "h w i"),
    ("n t h w c", "n w"), ("n h w c", ""), ("n h", "n h"),
]  # fmt: skip


@pytest.mark.parametrize(("layout", "over"), LAYOUTS)
def test_what_shares_a_colour_shares_a_mean(layout, over):
    """Against jn.moments, whose mean depends on the entries that share it and on no others."""
    one = cube(layout, over)
    sides = one.right, one.deep, one.up
    sizes = {**one.right, **one.deep, **one.up}
    frame = [int(np.prod(list(side.values()), dtype=int)) for side in sides]
    same, _ = one.shared(*np.indices(frame).reshape(3, -1))
    if not over:
        assert same.sum() == 1
        return
    dims = parse(layout)
    order = np.arange(np.prod(frame)).reshape(list(sizes.values()))  # of the entries, by their number in the cube
    order = order.transpose([list(sizes).index(name) for dim in dims for name in dim])
    order = order.reshape([int(np.prod([sizes[name] for name in dim])) for dim in dims])
    parts = {name: sizes[name] for dim in dims if len(dim) > 1 for name in dim}
    reached = jax.jacobian(lambda x: jn.moments(x, layout, over, sizes=parts).mean)(jnp.asarray(order, jnp.float32))
    rows = np.asarray(reached).reshape(-1, order.size)[:, np.argsort(order.ravel())]
    picked = np.ravel_multi_index((frame[0] - 1, 0, frame[2] - 1), frame)
    (mine,) = rows[rows[:, picked] != 0]
    np.testing.assert_array_equal(mine != 0, same)


def test_neighbours_of_other_statistics_are_of_another_grey():
    """Batch norm: the side and the top are stripes, one a channel; the front is one channel."""
    one = cube("n h w c", "n h w")
    depth = np.arange(6)
    same, parity = one.shared(np.full(6, 3), depth, np.full(6, 3))
    assert same.tolist() == [True] + [False] * 5
    assert parity.tolist() == [0, 1, 0, 1, 0, 1]


def test_one_cube_for_each_norm_and_every_norm_has_one():
    picture = jn.inspect.plot_cube(jn.norms().names)
    assert [axes.get_title() for axes in picture.axes[: len(jn.norms())]] == list(jn.norms().names)
    for axes, row in zip(picture.axes, jn.norms(), strict=False):
        assert (coloured(axes)[0] > 0) == bool(row.over)
        (caption,) = (text.get_text() for text in axes.texts if "layout" in text.get_text())
        assert f'layout  "{row.layout}"\nover  "{row.over}"' in caption
    words = {axes.get_title(): axes.texts[-1].get_text().splitlines()[-1] for axes in picture.axes if axes.texts}
    assert words["batch"] == "one mean and variance for each c"
    assert words["layer"] == "one mean and variance for each n, space"
    assert words["group"] == "one mean and variance for each n, g"
    assert words["FiLM"] == "no statistics of x"


def test_a_mapped_axis_makes_two_cubes_in_one_colour():
    (axes,) = jn.inspect.plot_cube(layout="n h w c", over="n h w devices?").axes
    assert coloured(axes) == (2 * 24, 2 * 64)
    assert {"devices 0", "devices 1"} <= {text.get_text() for text in axes.texts}


def test_what_the_cube_refuses():
    for bad, message in (
        ({"norms": "bach"}, "there is no norm 'bach'. Did you mean 'batch'"),
        ({}, "takes the name of a norm, or layout= and over= together"),
        ({"layout": "n c"}, "takes the name of a norm, or layout= and over= together"),
        ({"norms": "batch", "over": "n"}, "names of norms, or layout= and over=, not both"),
        ({"norms": []}, "needs the name of a norm"),
        ({"layout": "", "over": "n"}, "layout needs a dimension"),
    ):
        with pytest.raises(ArgumentError, match=rf"^jaxnorm\.inspect\.plot_cube: .*{message}"):
            jn.inspect.plot_cube(**bad)
    with pytest.raises(LayoutError, match="the name 'n' is repeated"):
        jn.inspect.plot_cube(layout="n n", over="n")


# --- statistics, drift, depth


def lines(axes):
    return [line.get_ydata() for line in axes.lines]


def bands(axes):
    """Of each band the lower and the upper end, by layer."""
    out = []
    for band in axes.collections:
        points = band.get_paths()[0].vertices
        out.append([(points[points[:, 0] == x, 1].min(), points[points[:, 0] == x, 1].max()) for x in (1, 2)])
    return out


def variables():
    own = {"mean": np.array([1.0, 2, 3, 4, 9]), "var": np.array([0, 1e-6, 0.5, 2, 8]), "scale": np.arange(5.0) - 2}
    return {"bn2": own, "bn10": {"mean": np.ones(3), "var": np.full(3, 4.0)}, "ln": {"scale": np.array([1.0, 3.0])}}


def test_statistics_by_layer():
    picture = jn.inspect.plot_statistics(variables(), epsilon=1e-5)
    mean, var, scale = picture.axes
    assert [axes.get_ylabel() for axes in picture.axes] == ["running mean", "running variance", "scale"]
    np.testing.assert_array_equal(lines(mean)[0], [3, 1, np.nan])
    np.testing.assert_array_equal(lines(scale)[0], [0, np.nan, 2])
    np.testing.assert_allclose(lines(var)[0][:2], [np.median([1e-6, 0.5, 2, 8]), 4])  # a variance of 0 has no decade
    whole, half = bands(mean)
    assert whole == [(1, 9), (1, 1)]
    assert half == [(2, 4), (1, 1)]
    assert var.get_yscale() == "log"
    assert var.lines[1].get_ydata()[0] == 1e-5
    assert [label.get_text() for label in scale.get_xticklabels()] == ["bn2", "bn10", "ln"]
    only = jn.inspect.plot_statistics(variables(), where="ln")
    assert [axes.get_ylabel() for axes in only.axes] == ["scale"]
    many = jn.inspect.plot_statistics({f"a{i}": {"scale": np.ones(2)} for i in range(30)}).axes[0]
    assert many.get_xlabel() == "norm, in the order of the report"


def test_statistics_of_what_is_broken_are_drawn_too():
    broken = {"bn": {"mean": np.array([np.nan, np.inf]), "var": np.array([-1.0, np.nan])}}
    assert len(jn.inspect.plot_statistics(broken, epsilon=0.0).axes) == 2
    assert len(jn.inspect.plot_statistics(broken).axes) == 2
    with pytest.raises(ArgumentError, match=r"^jaxnorm.inspect.plot_statistics: there is no norm"):
        jn.inspect.plot_statistics({"kernel": np.ones((2, 2))})


def test_what_cannot_be_drawn_is_marked():
    """At the bottom edge: NaN in a mean, a variance of 0 or less; and a norm without neighbours has bands."""
    own = [np.array([1.0, 2, 3, 4, 9]), np.array([1.0, np.nan, 2, 3, 4])]
    tree = {f"bn{i}": {"mean": own[i == 2], "var": own[0] * (i != 1), "scale": own[0]} for i in range(4)}
    picture = jn.inspect.plot_statistics(tree)
    mean, var, scale = picture.axes

    def marked(axes):
        return [line.get_xdata().tolist() for line in axes.lines if line.get_marker() == "x"]

    assert (marked(mean), marked(var), marked(scale)) == ([[3]], [[2]], [])
    (cross,) = (line for line in var.lines if line.get_marker() == "x")
    edge = cross.get_transform().transform(cross.get_xydata()[0])[1]
    np.testing.assert_allclose(edge, var.transAxes.transform((0, 0))[1])
    assert [text.get_text() for text in picture.legends[0].get_texts()][-1] == "not finite, or var \u2264 0"
    assert len(jn.inspect.plot_statistics({"bn": tree["bn0"]}).legends[0].get_texts()) == 3
    alone = jn.inspect.plot_statistics({"bn": tree["bn0"]}).axes[0]
    ends = [segment[:, 1].tolist() for lines in alone.collections[2:] for segment in lines.get_segments()]
    assert ends == [[1, 9], [2, 4]]
    assert len(var.collections) == 4  # bn0 has no neighbour that is drawn
    assert len(scale.collections) == 2


def test_long_names():
    names = [f"encoder/stage/a_rather_long_block_name_{i}/BatchNorm_0" for i in range(3)]
    tree = {name: {"mean": np.ones(2), "var": np.ones(2)} for name in names}
    expected = [f"a_rather_lon...{name[-13:]}" for name in names]
    assert [z.get_text() for z in jn.inspect.plot_statistics(tree).axes[-1].get_xticklabels()] == expected
    twins = {f"{'a' * 20}{i}{'b' * 20}": {"scale": np.ones(2)} for i in range(2)}  # alike without their middle
    assert [z.get_text() for z in jn.inspect.plot_statistics(twins).axes[0].get_xticklabels()] == list(twins)
    legend = jn.inspect.plot_drift([tree, tree]).legends[0]
    assert [z.get_text() for z in legend.get_texts()] == expected
    many = {f"{name}{i}": z for i in (0, 1) for name, z in tree.items() if name != names[0]}
    assert jn.inspect.plot_drift([many, many]).legends[0]._ncols == 1
    assert jn.inspect.plot_drift([{"a": z} for z in tree.values()]).legends[0]._ncols == 1


def test_drift_of_what_is_broken():
    """No point where nothing is finite, least of all one at 0."""
    def state(mean, var):
        return {"bn": {"mean": np.full(2, mean), "var": np.full(2, var)}, "ok": {"mean": np.ones(2), "var": np.ones(2)}}

    for last, means, variances in (
        ((np.nan, 1.0), [np.nan, np.nan], [0, 0]), ((1.0, 0.0), [np.nan, np.nan], [np.nan, np.nan]),
        ((1.0, -1.0), [np.nan, np.nan], [np.nan, np.nan]), ((2.0, 1.0), [2, 0], [0, 0]),
    ):  # fmt: skip
        for axes, expected, title in zip(
            jn.inspect.plot_drift([state(0.0, 1.0), state(*last)]).axes, (means, variances), ("means", "variances"),
            strict=True,
        ):  # fmt: skip
            np.testing.assert_array_equal(lines(axes), [expected, [0, 0]])
            gaps = ", with gaps in 1 of 2: not finite" * bool(np.isnan(expected).any())
            assert axes.get_title() == title + gaps


def test_drift():
    means, variances = RNG.normal(size=(4, 2, 5)), RNG.uniform(1, 3, (4, 2, 5))
    states = [
        {"params": {"ln": {"scale": np.ones(2)}},
         "batch_stats": {f"bn_{i}": {"mean": m[i], "var": v[i]} for i in range(2)}}
        for m, v in zip(means, variances, strict=True)
    ]  # fmt: skip
    picture = jn.inspect.plot_drift(states, [0, 10, 20, 100])
    left, right = picture.axes
    expected = np.sqrt((((means - means[-1]) / np.sqrt(variances[-1])) ** 2).mean(-1))
    np.testing.assert_allclose(lines(left), expected.T)
    np.testing.assert_allclose(lines(right), np.sqrt((np.log(variances / variances[-1]) ** 2).mean(-1)).T)
    assert left.lines[0].get_xdata().tolist() == [0, 10, 20, 100]
    assert [text.get_text() for text in picture.legends[0].get_texts()] == ["bn_0", "bn_1"]
    assert len(jn.inspect.plot_drift(states, where="bn_1").axes[0].lines) == 1
    for bad, message in (
        ((states[:1],), "needs two states or more"),
        ((states, [0, 1]), "and a step for each, got 4 and 2 steps"),
        (([{"ln": {"scale": np.ones(2)}}] * 2,), "there is no batch norm among the states"),
        (([states[0], {"bn": {"mean": np.ones(2), "var": np.ones(2)}}],), "state 0 has other norms"),
    ):
        with pytest.raises(ArgumentError, match=rf"^jaxnorm\.inspect\.plot_drift: .*{message}"):
            jn.inspect.plot_drift(*bad)


def test_depth():
    activations = {"b": RNG.normal(size=(4, 5)), "a": jnp.asarray(RNG.normal(3, 2, 7), jnp.float32)}
    gradients = {"params": {f"layer_{i}": {"kernel": RNG.normal(size=(3, 3))} for i in (2, 10)}}
    left, right = jn.inspect.plot_depth(activations, gradients).axes
    np.testing.assert_allclose(lines(left)[0], [np.median(z) for z in activations.values()], rtol=1e-6)
    outer, _ = bands(left)
    np.testing.assert_allclose(outer, [np.quantile(z, [0.05, 0.95]) for z in activations.values()], rtol=1e-6)
    assert [label.get_text() for label in left.get_xticklabels()] == ["b", "a"]  # in the order of the dict
    kernels = [gradients["params"][f"layer_{i}"]["kernel"] for i in (2, 10)]  # in that of the numbers
    np.testing.assert_allclose(lines(right)[0], [np.median(np.abs(z)) for z in kernels])
    assert right.get_yscale() == "log"
    assert [label.get_text() for label in right.get_xticklabels()] == [f"params/layer_{i}/kernel" for i in (2, 10)]
    assert len(jn.inspect.plot_depth([np.array([np.nan, 1.0]), np.array([])]).axes) == 1
    with pytest.raises(ArgumentError, match="there is no array to draw"):
        jn.inspect.plot_depth({})


# --- what all have in common


def test_figures_are_the_callers_alone():
    """In a process where pyplot would be asked: it is not even imported."""
    code = (
        "import sys, numpy as np, jaxnorm as jn\n"
        "assert 'matplotlib' not in sys.modules\n"
        "jn.inspect.plot_cube('batch'); jn.inspect.plot_depth([np.ones(3)])\n"
        "assert 'matplotlib.pyplot' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_picture_has_one_name():
    for bad in (["cube"], "cub", None):
        with pytest.raises(ArgumentError, match=r"^jaxnorm.inspect.plot: there is no picture"):
            jn.inspect.plot(bad)


def test_they_show_themselves_in_a_notebook_and_say_what_is_missing(monkeypatch):
    picture = jn.inspect.plot_cube("group")
    assert isinstance(picture, Figure)
    assert picture._repr_png_().startswith(b"\x89PNG")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ArgumentError, match=r'plot_cube: pictures need matplotlib: pip install "jaxnorm\[lab\]"'):
        jn.inspect.plot_cube("group")


def test_names_are_drawn_as_they_are():
    """Not as formulas, and without what a terminal or a font cannot show."""
    tree = {"a$b$^": {"scale": np.ones(2)}, "c\x1b": {"scale": np.ones(2)}}
    picture = jn.inspect.plot_statistics(tree)
    assert [label.get_text() for label in picture.axes[0].get_xticklabels()] == ["a$b$^", "c?"]
    picture._repr_png_()


def test_by_name():
    figure = jn.inspect.plot("depth", [np.ones(3), np.ones(3)])
    assert [axes.get_ylabel() for axes in figure.axes] == [
        axes.get_ylabel() for axes in jn.inspect.plot_depth([np.ones(3), np.ones(3)]).axes
    ]
    with pytest.raises(ArgumentError, match=r"inspect.plot: there is no picture 'cubes'. Did you mean 'cube'"):
        jn.inspect.plot("cubes")
