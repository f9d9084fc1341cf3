"""The language of layouts: what is read, how it meets a shape, how arrays are placed by name."""

import numpy as np
import pytest

from jaxnorm.layout import averaged, kept, last, meet, parse, place

READ = [
    ("n h w c", (("n",), ("h",), ("w",), ("c",))),
    ("  n   c ", (("n",), ("c",))),
    (("n", "...", "(g k)"), (("n",), ("...",), ("g", "k"))),
    ("n ... (g k)", (("n",), ("...",), ("g", "k"))),
    ("(m n) c_1", (("m", "n"), ("c_1",))),
    ("( g  k )", (("g", "k"),)),
    ("(c)", (("c",),)),
    ("", ()),
]


@pytest.mark.parametrize(("text", "dims"), READ)
def test_parse(text, dims):
    assert parse(text) == dims


MEET = [
    ("n ... c", (2, 3), {}, ("n", "c"), (2, 3)),
    ("n ... c", (2, 4, 5, 3), {}, ("n", "...0", "...1", "c"), (2, 4, 5, 3)),
    ("... c", (7,), {}, ("c",), (7,)),
    ("n (g k)", (2, 12), {"g": 3}, ("n", "g", "k"), (2, 3, 4)),
    ("n (g k)", (2, 12), {"k": 3}, ("n", "g", "k"), (2, 4, 3)),
    ("(a b d) c", (24, 1), {"a": 2, "d": 4}, ("a", "b", "d", "c"), (2, 3, 4, 1)),
    ("(m n) c", (0, 3), {"m": 2}, ("m", "n", "c"), (2, 0, 3)),
    ("n c", (2, 3), {"c": 3}, ("n", "c"), (2, 3)),
]


@pytest.mark.parametrize(("layout", "shape", "sizes", "names", "split"), MEET)
def test_meet(layout, shape, sizes, names, split):
    frame = meet(layout, shape, sizes)
    assert (frame.names, frame.sizes) == (names, split)
    x = np.arange(np.prod(shape)).reshape(shape)
    np.testing.assert_array_equal(frame.join(frame.split(x)), x)
    assert frame.split(x).shape == split


def test_lists_by_role():
    assert averaged("n ... c", "... n devices? rows") == ("n", "...")
    assert kept("n ... (g k)", "... k") == ("n", "g")
    assert [last("n c ..."), last("n ... (g k)"), last("...")] == ["c", "(g k)", "..."]


def test_place_is_by_name():
    frame = meet("n h w c", (2, 3, 4, 5))
    array = np.arange(10).reshape(5, 2)
    placed = place(array, ("c", "n"), frame, "scale")
    assert placed.shape == (2, 1, 1, 5)
    np.testing.assert_array_equal(placed[:, 0, 0], array.T)
