"""What is imported goes on as it would have: values after five more training steps, in torch, linen and nnx."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from converting import BATCHES, TARGETS, blank, close, evaluated, net, torch_evaluated, torch_net, torch_steps, trained
from flax import nnx

import jaxnorm as jn
import jaxnorm.linen
import jaxnorm.nnx
from jaxnorm.errors import ArgumentError

convert = jn.tools.convert


@pytest.fixture(autouse=True)
def relaxed():
    """flax.linen.Conv adds a vector to a picture."""
    with jax.numpy_rank_promotion("allow"):
        yield


# --- torch


def goes_on_as_torch(model, variables, peer):
    """Outputs now; and after five more steps outputs, parameters and statistics."""
    close(evaluated(model, variables), torch_evaluated(peer))
    torch_steps(peer, BATCHES[2:], TARGETS[2:])
    after = trained(model, variables)
    close(evaluated(model, after), torch_evaluated(peer))
    close(after["params"]["fc"]["kernel"], peer.fc.weight.detach().numpy().T)
    for ours, theirs in (("mean", peer.bn.running_mean), ("var", peer.bn.running_var)):
        close(after["batch_stats"]["bn"][ours], theirs.numpy())


@pytest.mark.parametrize("momentum", [0.3, None])
def test_a_torch_module(momentum):
    """Its settings are read from its layers."""
    peer = torch_net(momentum, 1e-3)
    kept = None if momentum is None else 0.7
    model = net(1e-5, momentum=kept, epsilon=1e-3, unbiased=True)
    variables, report = convert(peer, blank(model))
    assert report.settings == {"momentum": kept, "epsilon": 1e-3, "unbiased": True, "debias": False}
    assert {path: layer["epsilon"] for path, layer in report.layers.items()} == {"bn": 1e-3, "gn": 1e-5, "ln": 1e-5}
    if momentum is None:
        assert int(variables["batch_stats"]["bn"]["num_updates"]) == 2
    goes_on_as_torch(model, variables, peer)


@pytest.mark.parametrize("suffix", ["pth", "safetensors", None])
def test_a_torch_state_dict(suffix, tmp_path):
    """It says no settings: they are torch's defaults, and the table says so."""
    peer = torch_net()
    source = peer.state_dict()
    if suffix == "safetensors":
        pytest.importorskip("safetensors", reason="safetensors is not installed")
    if suffix:
        jn.tools.write(tmp_path / f"net.{suffix}", source)
        source = tmp_path / f"net.{suffix}"
    model = net(1e-5, momentum=0.9, unbiased=True)
    variables, report = convert(source, blank(model))
    assert report.settings == {"momentum": 0.9, "epsilon": 1e-5, "unbiased": True, "debias": False}
    assert dict(zip(*(report.to_dict()[name] for name in ("target", "settings")), strict=True))["bn"] == "default"
    goes_on_as_torch(model, variables, peer)


def test_unbiased_is_what_makes_it_torch():
    """Without Bessel's correction the variance after five steps is another: the check above can fail."""
    peer = torch_net()
    model = net(1e-5, momentum=0.9, unbiased=False)
    after = trained(model, convert(peer, blank(model))[0])
    torch_steps(peer, BATCHES[2:], TARGETS[2:])
    assert np.max(np.abs(after["batch_stats"]["bn"]["var"] - peer.bn.running_var.numpy())) > 1e-4


def test_torch_there_and_back():
    """Every bit, but for the count of batches that Flax does not keep: the template's stays."""
    peer = torch_net()
    model = net(1e-5)
    variables, _ = convert(peer, blank(model))
    other = torch_net(momentum=0.5)
    tree, report = convert(variables, other)
    assert report.settings == {"momentum": pytest.approx(0.01), "eps": 1e-5}
    for name, value in peer.state_dict().items():
        assert tree[name].dtype == value.dtype
        np.testing.assert_array_equal(tree[name].numpy(), value.numpy())
    other.load_state_dict(tree)
    np.testing.assert_array_equal(torch_evaluated(other), torch_evaluated(peer))


def test_torch_into_nnx():
    peer = torch_net(0.2)

    class Net(nnx.Module):
        def __init__(self, rngs):
            self.conv = nnx.Conv(3, 4, (3, 3), padding="VALID", rngs=rngs)
            self.bn = jaxnorm.nnx.BatchNorm(4, momentum=0.8, unbiased=True, rngs=rngs)
            self.gn = jaxnorm.nnx.GroupNorm(4, 2, epsilon=1e-5, rngs=rngs)
            self.drop = nnx.Dropout(0.5, rngs=rngs)
            self.ln = jaxnorm.nnx.LayerNorm(4, epsilon=1e-5, rngs=rngs)
            self.fc = nnx.Linear(4, 2, rngs=rngs)

        def __call__(self, x):
            x = self.gn(nnx.relu(self.bn(self.conv(x))))
            return self.fc(self.ln(jnp.mean(x, (1, 2))))

    module = Net(nnx.Rngs(0))
    key = module.drop.rngs.key[...]
    state, report = convert(peer, nnx.state(module))
    assert report.settings["momentum"] == 0.8
    nnx.update(module, state)
    assert key == module.drop.rngs.key[...]  # no array of the model
    module.eval()
    close(module(BATCHES[0]), torch_evaluated(peer))
    module.train()
    peer.train()
    import torch

    for x in BATCHES[2:]:
        module(x)
        peer(torch.tensor(x.transpose(0, 3, 1, 2)))
    close(module.bn.var[...], peer.bn.running_var.numpy())

    # and between nnx and linen, to the bit, with a whole module as the source
    model = net(1e-5)
    variables, _ = convert(module, blank(model))
    again, _ = convert(variables, nnx.state(module), where=["conv", "bn", "gn", "ln", "fc"])
    assert jax.tree.structure(again) == jax.tree.structure(nnx.state(module))
    for name in ("scale", "bias", "mean", "var"):
        collection = variables["params" if name in ("scale", "bias") else "batch_stats"]
        np.testing.assert_array_equal(collection["bn"][name], getattr(module.bn, name)[...])
        np.testing.assert_array_equal(again["bn"][name][...], getattr(module.bn, name)[...])


@pytest.mark.parametrize("dims", [1, 2])
def test_transposed_convolutions(dims):
    torch = pytest.importorskip("torch", reason="torch is not installed")
    peer = {1: torch.nn.ConvTranspose1d, 2: torch.nn.ConvTranspose2d}[dims](3, 5, 3, stride=2)
    x = BATCHES[0][:2, :, 0] if dims == 1 else BATCHES[0][:2]
    model = nn.ConvTranspose(5, (3,) * dims, (2,) * dims, padding="VALID")
    template = {"params": {"up": jax.eval_shape(model.init, jax.random.key(0), x)["params"]}}
    source = {f"up.{name}": value for name, value in peer.state_dict().items()}
    tree, report = convert(source, template, transposed="up")
    assert report.rows[0]["changes"] == "io* -> *io, flipped"
    said = convert(torch.nn.ModuleDict({"up": peer}), template).variables  # a module says what it is
    jax.tree.map(np.testing.assert_array_equal, said, tree)
    expected = peer(torch.tensor(np.moveaxis(x, -1, 1))).detach().numpy()
    close(model.apply({"params": tree["params"]["up"]}, x), np.moveaxis(expected, 1, -1))
    back, _ = convert(tree, source, transposed="up")
    np.testing.assert_array_equal(back["up.weight"].numpy(), peer.weight.detach().numpy())


def test_grouped_convolutions_embeddings_and_square_kernels():
    torch = pytest.importorskip("torch", reason="torch is not installed")
    grouped, embedding, square = torch.nn.Conv2d(4, 6, 3, groups=2), torch.nn.Embedding(4, 4), torch.nn.Linear(4, 4)
    source = torch.nn.ModuleDict({"conv": grouped, "table": embedding, "fc": square}).state_dict()
    template = {
        "conv": {"kernel": np.zeros((3, 3, 2, 6)), "bias": np.zeros(6)},
        "table": {"embedding": np.zeros((4, 4))}, "fc": {"kernel": np.zeros((4, 4)), "bias": np.zeros(4)},
    }  # fmt: skip
    tree, _ = convert(source, {"params": template})
    x = RNG.normal(size=(2, 5, 5, 4)).astype(np.float32)
    model = nn.Conv(6, (3, 3), padding="VALID", feature_group_count=2)
    expected = grouped(torch.tensor(x.transpose(0, 3, 1, 2))).detach().numpy().transpose(0, 2, 3, 1)
    close(model.apply({"params": jax.tree.map(np.float32, tree["params"]["conv"])}, x), expected)
    np.testing.assert_array_equal(tree["params"]["table"]["embedding"], embedding.weight.detach().numpy())
    np.testing.assert_array_equal(tree["params"]["fc"]["kernel"], square.weight.detach().numpy().T)
    back, _ = convert(tree, source)
    for name, value in source.items():
        np.testing.assert_array_equal(back[name].numpy(), value.numpy())


# --- names


RNG = np.random.default_rng(1)
STATE_DICT = {
    **{f"blocks.{i}.0.weight": RNG.normal(size=(4, 4)).astype(np.float32) for i in range(3)},
    **{f"blocks.{i}.1.{name}": RNG.random(4).astype(np.float32)
       for i in range(3) for name in ("weight", "bias", "running_mean", "running_var")},
}  # fmt: skip


def variables_like(dense="block_{}/dense", bn="block_{}/bn", count=3):
    params, stats = {}, {}
    for i in range(count):
        for at, tree, leaves in (
            (dense, params, {"kernel": (4, 4)}), (bn, params, {"scale": (4,), "bias": (4,)}),
            (bn, stats, {"mean": (4,), "var": (4,)}),
        ):  # fmt: skip
            for word in at.format(i).split("/"):
                tree = tree.setdefault(word, {})
            tree |= {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in leaves.items()}
    return {"params": params, "batch_stats": stats}


PATTERNS = {"block_{}/dense": "blocks.{}.0", "block_{}/bn": "blocks.{}.1"}


@pytest.mark.parametrize(
    "names",
    [
        PATTERNS,
        {"block_{}": "blocks.{}", "block_{}/dense": "blocks.{}.0", "block_{}/bn": "blocks.{}.1"},  # the longer one
        lambda path: path.replace("block_", "blocks.").replace("/dense", ".0").replace("/bn", ".1"),
        "in order",
    ],
    ids=["patterns", "nested", "function", "in order"],
)
def test_names(names):
    tree, report = convert(STATE_DICT, variables_like(), names=names)
    assert report.title == "6 layers of torch into flax, 3 norms"
    for i in range(3):
        np.testing.assert_array_equal(
            tree["params"][f"block_{i}"]["dense"]["kernel"], STATE_DICT[f"blocks.{i}.0.weight"].T
        )
        for name, theirs in {"mean": "running_mean", "var": "running_var"}.items():
            np.testing.assert_array_equal(
                tree["batch_stats"][f"block_{i}"]["bn"][name], STATE_DICT[f"blocks.{i}.1.{theirs}"]
            )


def test_a_prefix():
    """All that lies below a name, or below the root."""
    source = {f"module.{name}": value for name, value in STATE_DICT.items()}
    target = variables_like("blocks/{}/0", "blocks/{}/1")
    with pytest.raises(ArgumentError, match=r"""begin with 'module': names=\{"": 'module'\}\?"""):
        convert(source, target)
    for names in ({"": "module"}, {"blocks": "module.blocks"}):
        tree, _ = convert(source, target, names=names)
        stats = tree["batch_stats"]["blocks"]["2"]["1"]
        np.testing.assert_array_equal(stats["var"], STATE_DICT["blocks.2.1.running_var"])


def test_a_checkpoint_of_more_than_a_model(tmp_path):
    """The model lies below a name, beside an optimizer's state, whose moments are no parameters."""
    from flax import serialization

    expected, target = convert(STATE_DICT, variables_like(), names=PATTERNS).variables, variables_like()
    moments = {"state": {"0": {"weight": np.ones((4, 4)), "exp_avg": np.ones(4)}}}
    for model, optimizer in (("state_dict", "optimizer"), ("model_state_dict", "optimizer_state_dict"),
                             ("model", "optimizer_state"), ("model", "opt_state")):  # fmt: skip
        saved = {model: STATE_DICT, optimizer: moments, "epoch": 3, "step": np.array(9)}
        (tmp_path / "all.msgpack").write_bytes(serialization.msgpack_serialize(saved))
        tree, report = convert(tmp_path / "all.msgpack", target, framework="torch", names=PATTERNS)
        title = f"6 layers of torch into flax, 3 norms, of {model!r}, without {optimizer!r}, 'step'"
        assert report.title == title
        jax.tree.map(np.testing.assert_array_equal, tree, expected)
        assert all(path.startswith(f"{model}/blocks/") for path in jn.tools.find_norms(saved).paths)
    # beside arrays that are not the optimizer's, and where it may be a layer's name, all is shown
    for saved in (
        {"state_dict": STATE_DICT, "average": {"a.weight": np.ones(4)}}, {"model": STATE_DICT},
        {"model": STATE_DICT, "average": {"a.weight": np.ones(())}},
    ):  # fmt: skip
        name = next(iter(saved))
        names = {theirs: f"{name}.{ours}" for theirs, ours in PATTERNS.items()}
        tree, report = convert(saved, target, names=names, strict=False)
        assert [row["source"] for row in report if row.get("problem")] == ["average/a"] * (len(saved) - 1)
        jax.tree.map(np.testing.assert_array_equal, tree, expected)
    with pytest.raises(ArgumentError, match="the source holds no arrays: dict, without 'optimizer'"):
        convert({"optimizer": moments}, target)


def test_where_leaves_the_rest_alone():
    target = jax.tree.map(lambda leaf: jnp.full(leaf.shape, 7.0), variables_like())
    tree, report = convert(STATE_DICT, target, names=PATTERNS, where="*/bn")
    assert [row["target"] for row in report.rows] == ["block_0/bn", "block_1/bn", "block_2/bn"]
    assert np.all(tree["params"]["block_0"]["dense"]["kernel"] == 7)
    np.testing.assert_array_equal(tree["params"]["block_0"]["bn"]["scale"], STATE_DICT["blocks.0.1.weight"])
    assert len(convert(STATE_DICT, target, names=PATTERNS, where=lambda layer: layer.kind == "kernel").report) == 3


def test_scale_minus_one():
    """As some language models store RMS norm's."""
    tree, report = convert({"norm.weight": np.float32([0.0, 0.5])}, {"norm": {"scale": np.ones(2, np.float32)}},
                           scale_offset=1.0)  # fmt: skip
    assert tree["norm"]["scale"].tolist() == [1.0, 1.5]
    assert report.rows[0]["changes"] == "scale + 1"
    assert "epsilon" not in report.layers["norm"]  # torch's RMSNorm and a LayerNorm without bias have two
    report = convert({"norm.weight": np.ones(2)}, {"norm": {"scale": np.ones(2)}}, settings={"epsilon": 1e-12}).report
    assert (report.layers["norm"], report.rows[0]["settings"]) == ({"epsilon": 1e-12}, "given")


def test_the_targets_dtype_and_sharding():
    mesh = jax.make_mesh((2,), ("devices",), devices=jax.devices()[:2])
    sharding = jax.NamedSharding(mesh, jax.sharding.PartitionSpec("devices"))
    target = {"scale": jax.device_put(jnp.zeros(4, jnp.bfloat16), sharding), "bias": np.zeros(4, np.float64)}
    tree, _ = convert({"n.weight": np.float32([1, 2, 3, 4.001]), "n.bias": np.ones(4, np.float32)}, {"n": target})
    assert (tree["n"]["scale"].dtype, tree["n"]["scale"].sharding) == (jnp.bfloat16, sharding)
    assert tree["n"]["scale"].tolist() == [1, 2, 3, 4]
    assert isinstance(tree["n"]["bias"], np.ndarray)


# --- what does not fit


def test_all_that_does_not_fit_is_listed():
    source = {**STATE_DICT, "extra.weight": np.ones((2, 3)), "blocks.1.0.weight": np.ones((5, 4))}
    del source["blocks.0.1.bias"]
    target = variables_like(count=4)
    with pytest.raises(ArgumentError) as error:
        convert(source, target, names=PATTERNS)
    assert str(error.value) == (
        "jaxnorm.tools.convert: 5 layers do not fit, torch into flax. Give names=, or strict=False to leave them.\n"
        "  block_0/bn: missing in the source: bias (4,)\n"
        "  block_1/dense: other shape: kernel (4, 4) wanted, weight (5, 4) is there, (4, 5) in the target's layout\n"
        "  block_3/bn: missing in the source: 'blocks/3/1', mean (4,), var (4,), bias (4,), scale (4,) Did you mean "
        "'blocks/2/1'?\n"
        "  block_3/dense: missing in the source: 'blocks/3/0', kernel (4, 4) Did you mean 'blocks/2/0'?\n"
        "  extra: not in the target: weight (2, 3)"
    )
    target = jax.tree.map(lambda leaf: np.full(leaf.shape, 7, leaf.dtype), target)
    tree, report = convert(source, target, names=PATTERNS, strict=False)
    assert np.all(tree["params"]["block_0"]["bn"]["bias"] == 7)
    np.testing.assert_array_equal(tree["params"]["block_0"]["bn"]["scale"], STATE_DICT["blocks.0.1.weight"])
    assert sum(row.get("problem") is not None for row in report.rows) == 5
    assert report.title.endswith("5 with a problem")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda t: convert(STATE_DICT, t, names={"block_{}/bm": "blocks.{}.1"}), "names has 'block_{}/bm'"),
        (lambda t: convert(STATE_DICT, t, names={"block_{}/bn": "b.{}.{}"}), "more places"),
        (lambda t: convert(STATE_DICT, t, names={"block_{}/bn": "b.{}", "{}_0/bn": "{}"}), "two names for 'block_0"),
        (lambda t: convert(STATE_DICT, t, names="alike"), 'a mapping, a function or "in order"'),
        (lambda t: convert(STATE_DICT, t, names=["a"]), r"a mapping, a function or \"in order\", got \['a'\]"),
        (lambda t: convert(STATE_DICT, t, names=PATTERNS, where="dens"), "where='dens' matches no layer"),
        (lambda t: convert(STATE_DICT, t, names=PATTERNS, settings=[1]), r"settings is a mapping .* got \[1\]"),
        (lambda t: convert(STATE_DICT, t, names=PATTERNS, settings={"momentum": "0.9"}), "or None, got '0.9'"),
        (lambda t: convert(STATE_DICT, t, names=PATTERNS, settings={"epsilon": -1}), "not negative, got -1"),
        (lambda t: convert(STATE_DICT, t, names=PATTERNS, settings={"epsilon": np.nan}), "not negative, got nan"),
        (lambda t: convert(STATE_DICT, t, names=PATTERNS, settings={"epsilon": "x"}), "a number, not negative"),
        (lambda t: convert(STATE_DICT, t, names=PATTERNS, settings={"unbiased": 3}), "is True or False, got 3"),
        (lambda t: convert(STATE_DICT, variables_like(count=2), names="in order"), "has 2 batch norms, the source 3"),
        (lambda t: convert(STATE_DICT, t, names=PATTERNS, transposed="up*"), "transposed='up\\*' matches no layer"),
        (lambda t: convert(STATE_DICT, t, names=PATTERNS, settings={"momentm": 1}), "Did you mean 'momentum'"),
        (lambda t: convert(STATE_DICT, t, names=PATTERNS, settings={"momentum": 10}), "0 to 1, or None, got 10"),
        (lambda t: convert(STATE_DICT, t, framework="tensorflow"), "no framework 'tensorflow'"),
        (lambda t: convert({"a": {"weight": np.ones(2), "kernel": np.ones((2, 2))}}, t), "whose the source is"),
        (lambda t: convert({"a": {"bias": np.ones(2)}}, t), "Give framework="),
        (lambda t: convert(STATE_DICT, {"a": {"bias": np.ones(2)}}), "Give target_framework="),
        (lambda t: convert({"a.weight": np.ones((2, 2)), "a.w": np.ones(2)}, t, framework="torch"), "two of w, weight"),
        (lambda t: convert({}, t), "the source holds no arrays: dict"),
        (lambda t: convert("missing.pth", t), "there is no file 'missing.pth'"),
    ],
)  # fmt: skip
def test_errors(call, message):
    with pytest.raises(ArgumentError, match=f"^jaxnorm.tools.convert: (.|\n)*{message}"):
        call(variables_like())


def test_an_average_that_needs_its_count():
    """torch's momentum=None is a mean of all batches: without their number it cannot go on."""
    peer = torch_net(None)
    with pytest.raises(ArgumentError, match="num_updates is 2, and the target keeps none: give its norm momentum=None"):
        convert(peer, blank(net(1e-5)))
    model = net(1e-5, momentum=None)
    with pytest.raises(ArgumentError, match="missing in the source: num_updates"):
        convert({k: v for k, v in peer.state_dict().items() if "tracked" not in k}, blank(model))
