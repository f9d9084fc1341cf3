"""What the norms of source and target were told, and values that do not arrive: the table says it."""

import jax
import numpy as np
import pytest
from converting import BATCHES, TARGETS, blank, close, net, torch_evaluated, torch_net, torch_steps, trained
from flax import nnx

import jaxnorm as jn
import jaxnorm.nnx
from jaxnorm.errors import ArgumentError

convert = jn.tools.convert


@pytest.fixture(autouse=True)
def relaxed():
    """flax.linen.Conv adds a vector to a picture."""
    with jax.numpy_rank_promotion("allow"):
        yield


def column(report, name):
    """By the target's path."""
    return dict(zip(report.to_dict()["target"], report.to_dict().get(name, [None] * len(report)), strict=True))


class Norms(nnx.Module):
    """A shared norm, norms in a list, and an attribute that is called as a norm's."""

    def __init__(self):
        rngs = nnx.Rngs(0)
        self.epsilon = 7.0
        self.ours = jaxnorm.nnx.BatchNorm(2, momentum=0.5, epsilon=1e-3, unbiased=True, rngs=rngs)
        self.again = self.ours
        self.flax = nnx.List([nnx.BatchNorm(2, momentum=0.7, epsilon=1e-2, rngs=rngs)])
        self.ln = nnx.LayerNorm(2, epsilon=1e-4, rngs=rngs)
        self.up = nnx.ConvTranspose(2, 2, (3,), rngs=rngs)


OURS = {"momentum": 0.5, "epsilon": 1e-3, "unbiased": True, "debias": False}
FLAX = {"momentum": 0.7, "epsilon": 1e-2, "unbiased": False, "debias": False}
NORM = {name: np.ones(2, np.float32) for name in ("weight", "bias", "running_mean", "running_var")}
STATE_DICT = {
    **{f"{at}.{name}": value for at in ("ours", "again", "flax.0") for name, value in NORM.items()},
    "ln.weight": np.ones(2), "ln.bias": np.ones(2), "up.weight": np.zeros((2, 2, 3)), "up.bias": np.zeros(2),
}  # fmt: skip


def test_an_nnx_module_says_its_settings():
    module = Norms()
    tree, report = convert(module, STATE_DICT)
    assert report.layers == {"ours": OURS, "again": OURS, "flax/0": FLAX, "ln": {"epsilon": 1e-4}}
    assert {column(report, "settings")[path] for path in report.layers} == {"source"}
    # torch's kernel (i, o, *) is that of the convolution whose gradient it is, and runs the other way
    kernel = np.asarray(module.up.kernel[...])
    np.testing.assert_array_equal(tree["up.weight"], kernel[::-1].transpose(1, 2, 0))
    assert convert(module, STATE_DICT, settings={"epsilon": 0}).report.layers["flax/0"] == FLAX | {"epsilon": 0}


def test_a_targets_own_settings_are_compared():
    """Its values are the source's, its momentum stays its own."""
    said = column(convert(STATE_DICT, Norms()).report, "changes")
    assert said["ours"] == said["again"] == "its norm says momentum 0.5, epsilon 0.001"  # and Bessel, as torch
    assert said["flax/0"] == "its norm says momentum 0.7, epsilon 0.01, unbiased False"
    assert said["ln"] == "its norm says epsilon 0.0001"
    settings = {"momentum": 0.7, "epsilon": 1e-2, "unbiased": False}
    said = column(convert(STATE_DICT, Norms(), settings=settings).report, "changes")
    assert said["flax/0"] is None
    torch = pytest.importorskip("torch", reason="torch is not installed")
    peer = torch.nn.ModuleDict({"ours": torch.nn.BatchNorm1d(2, momentum=None)})
    said = column(convert(Norms(), peer, where="ours").report, "changes")
    assert said["ours"] == "its norm says momentum None, epsilon 1e-05"


def test_epsilon_is_given_to_all_norms():
    target = {f"{at}.{name}": value for at in ("ours", "ln") for name, value in NORM.items()}
    del target["ln.running_mean"], target["ln.running_var"]
    report = convert(target, target, settings={"epsilon": 1e-12, "momentum": 0.8}).report
    assert report.layers["ln"] == {"epsilon": 1e-12}
    assert report.layers["ours"] == {"momentum": 0.8, "epsilon": 1e-12, "unbiased": True, "debias": False}


def test_settings_that_no_norm_of_the_target_has():
    changes = {}
    for framework, names in (
        ("torch", "weight bias running_mean running_var"), ("keras", "gamma beta moving_mean moving_variance"),
    ):  # fmt: skip
        target = {f"bn/{name}" if framework == "keras" else f"bn.{name}": np.ones(2) for name in names.split()}
        for unbiased in (True, False):
            for more in ({"debias": True}, {"momentum": None}, {}):
                source = {"bn": {name: np.ones(2) for name in ("scale", "bias", "mean", "var")}}
                report = convert(source, target, settings={"unbiased": unbiased, **more}).report
                changes[framework, unbiased, *more] = report.rows[0]["changes"]
    with_, without = "torch will train with Bessel's variance", "keras will train without Bessel's variance"
    assert changes == {
        ("torch", True, "debias"): "torch will train without debiasing",
        ("torch", True, "momentum"): None,
        ("torch", True): None,
        ("torch", False, "debias"): f"{with_}, torch will train without debiasing",
        ("torch", False, "momentum"): with_,
        ("torch", False): with_,
        ("keras", True, "debias"): f"{without}, keras will train without debiasing",
        ("keras", True, "momentum"): f"{without}, keras has no average of all batches",
        ("keras", True): without,
        ("keras", False, "debias"): "keras will train without debiasing",
        ("keras", False, "momentum"): "keras has no average of all batches",
        ("keras", False): None,
    }


def test_an_export_goes_on_with_bessels_variance():
    """What the row warns of: the same weights and means after five more steps, another variance."""
    model = net(1e-5, momentum=0.9)
    variables, _ = convert(torch_net(), blank(model))
    peer = torch_net()
    state_dict, report = convert(variables, peer, settings={"momentum": 0.9, "epsilon": 1e-5})
    assert column(report, "changes")["bn"] == "torch will train with Bessel's variance"
    assert "its norm" not in str(report)
    peer.load_state_dict(state_dict)
    torch_steps(peer, BATCHES[2:], TARGETS[2:])
    after = trained(model, variables)
    close(after["params"]["conv"]["kernel"], peer.conv.weight.detach().numpy().transpose(2, 3, 1, 0))
    close(after["batch_stats"]["bn"]["mean"], peer.bn.running_mean.numpy())
    old, count = 0.9**5 * np.asarray(variables["batch_stats"]["bn"]["var"]), 16 * 3 * 3
    ours, theirs = np.asarray(after["batch_stats"]["bn"]["var"]), peer.bn.running_var.numpy()
    close(theirs - old, (ours - old) * count / (count - 1))
    assert np.min(theirs - ours) > 1e-4
    assert np.max(np.abs(torch_evaluated(peer) - np.asarray(model.apply(after, BATCHES[0])))) > 1e-5


def test_torchs_instance_norm_is_no_batch_norm():
    torch = pytest.importorskip("torch", reason="torch is not installed")
    peer = torch.nn.ModuleDict({"n": torch.nn.InstanceNorm1d(2, affine=True, track_running_stats=True)})
    leaves = {name: np.full(2, 7.0) for name in ("scale", "bias", "mean", "var")}
    with pytest.raises(ArgumentError, match="n: torch's InstanceNorm with running statistics trains on each example's"):
        convert(peer, {"n": leaves})
    assert convert(peer, {"n": leaves}, strict=False).variables["n"]["scale"].tolist() == [7, 7]
    with pytest.raises(ArgumentError, match="n: torch's InstanceNorm"):
        convert({"n": leaves}, peer)
    assert convert(peer.state_dict(), {"n": leaves}).variables["n"]["scale"].tolist() == [1, 1]
    assert convert(peer, peer).variables["n.weight"].tolist() == [1, 1]
    plain = torch.nn.ModuleDict({"n": torch.nn.InstanceNorm1d(2, affine=True)})
    del leaves["mean"], leaves["var"]
    assert convert(plain, {"n": leaves}).report.layers["n"] == {"epsilon": 1e-5}


def test_settings_that_differ():
    torch = pytest.importorskip("torch", reason="torch is not installed")
    peer = torch.nn.ModuleDict({"0": torch.nn.BatchNorm1d(4), "1": torch.nn.BatchNorm1d(4, momentum=0.5)})
    target = {str(i): {name: np.ones(4) for name in ("scale", "bias", "mean", "var")} for i in range(2)}
    _, report = convert(peer, target)
    assert report.layers["1"]["momentum"] == 0.5
    with pytest.raises(ArgumentError, match=r"momentum=0\.5, epsilon=1e-05, unbiased=True, debias=False: 1"):
        _ = report.settings
    assert convert(peer, target, settings={"momentum": 0.8}).report.settings["momentum"] == 0.8


def test_numbers_that_the_target_cannot_hold():
    with pytest.raises(ArgumentError, match="scale: float32 numbers that float16 cannot hold"):
        convert({"n.weight": np.float32([1e5, 1])}, {"n": {"scale": np.ones(2, np.float16)}})


def test_numbers_that_are_wrong_or_vanish_are_counted():
    source = {
        "n.weight": np.float32([np.nan, np.inf, 1, 2]), "n.bias": np.float32([1e-9, 0, 1, -1e-9]),
        "n.running_mean": np.ones(4), "n.running_var": np.array([-1.0, 0, 1e-60, 1]),
    }  # fmt: skip
    half, single = np.ones(4, np.float16), np.ones(4, np.float32)
    target = {"n": {"scale": half, "bias": half, "mean": single, "var": single}}
    tree, report = convert(source, target)
    assert set(report.rows[0]["changes"].split(", ")) == {
        "scale: 2 of 4 not finite", "bias: 2 of 4 too small for float16 and now 0", "var: 1 of 4 negative",
        "var: 1 of 4 too small for float32 and now 0",
    }  # fmt: skip
    assert tree["n"]["bias"].tolist() == [0, 0, 1, 0]
    ok = {name: np.abs(np.nan_to_num(value, nan=1, posinf=1)) + 1 for name, value in source.items()}
    assert convert(ok, target).report.rows[0]["changes"] is None
