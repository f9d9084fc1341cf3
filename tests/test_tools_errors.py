"""What the tools say of arguments that cannot be meant: one error of ours that names the call, never a traceback."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxnorm as jn
import jaxnorm.linen
import jaxnorm.nnx
from jaxnorm.errors import ArgumentError

T, X = jn.tools, jnp.ones((4, 3))
ONE = {"bn": {"scale": jnp.ones(3), "mean": jnp.zeros(3), "var": jnp.ones(3)}}
TWO = {"bn": {"mean": jnp.zeros((2, 3)), "var": jnp.ones((2, 3))}}


def collect(variables, x):
    return {"bn": jn.moments(x, "n c", "n")}


WRONG = {
    "merge along no axis": (lambda: T.merge_replicas(TWO, axis="x"), "merge_replicas: axis is the number"),
    "merge with no tolerance": (lambda: T.merge_replicas(TWO, tolerance=None), "tolerance is a number from 0"),
    "merge by names": (lambda: T.merge_replicas(TWO, counts=["a", "b"]), "counts must be 2 numbers"),
    "check along no axis": (lambda: T.check_replicas(TWO, axis="x"), "check_replicas: axis is the number"),
    "replicate along no axis": (lambda: T.replicate(ONE, 2, axis="x"), "replicas along axis 'x'"),
    "commit a list": (lambda: T.commit_if_finite(ONE, ONE, ok=[True]), "ok is one bool, .* got list"),
    "commit a word": (lambda: T.commit_if_finite(ONE, ONE, ok="yes"), "ok is one bool, .* got str"),
    "store no module": (lambda: jaxnorm.nnx.use_stored_stats(3), "model must be an nnx.Module, got int"),
    "store a module": (
        lambda: jaxnorm.linen.use_stored_stats(jaxnorm.linen.BatchNorm()), "give module.apply, not the module",
    ),
    "read a number": (lambda: T.read(3), "read: a path is needed, got int"),
    "read what is not there": (lambda: T.read("none.npz"), "there is no file 'none.npz'"),
    "write into no folder": (lambda: T.write("no/x.npz", ONE), "cannot write 'no/x.npz': there is no folder 'no'"),
    "recalibrate with no function": (lambda: T.recalibrate(3, ONE, [X]), "collect is a function .* got int"),
    "watch with no function": (lambda: jn.inspect.watch(3, ONE, [X, X]), "collect is a function .* got int"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_wrong_arguments(case, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    call, message = WRONG[case]
    with pytest.raises(ArgumentError, match=message):
        call()


def test_a_batch_of_nothing_changes_nothing():
    """Empty, or all masked: statistics stay, and the table says so."""
    masked = jn.moments(X, "n c", "n", mask=False)
    for give, x in ((collect, X[:0]), (lambda v, x: {"bn": masked}, X)):
        done, report = T.recalibrate(give, ONE, [x], progress=False)
        jax.tree.map(np.testing.assert_array_equal, done, ONE)
        assert report.title.startswith("0 of 1 batch norms")
        assert "nothing counted in 3 of 3 channels" in report.rows[0]["note"]


def test_numpys_integers_are_numbers():
    assert T.replicate(ONE, np.int64(2), axis=np.int64(0))["bn"]["mean"].shape == (2, 3)
