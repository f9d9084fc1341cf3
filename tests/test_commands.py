"""`jaxnorm import` and `jaxnorm fold`: files in, files and a table out, one clear line where something is wrong."""

import numpy as np
import pytest

import jaxnorm as jn
from jaxnorm.__main__ import main

RNG = np.random.default_rng(0)
NORM = {
    "weight": RNG.uniform(0.5, 2, 3), "bias": RNG.normal(size=3), "running_mean": RNG.normal(size=3),
    "running_var": RNG.uniform(0.5, 2, 3),
}  # fmt: skip
TORCH = {
    "0.conv.weight": RNG.normal(size=(3, 2, 3, 3)).astype(np.float32),
    **{f"0.bn.{name}": value.astype(np.float32) for name, value in NORM.items()},
    "0.bn.num_batches_tracked": np.array(7),
}


@pytest.fixture
def source(tmp_path):
    jn.tools.write(tmp_path / "net.npz", TORCH)
    return tmp_path / "net.npz"


def fails(capsys, *argv):
    """What the command says when it exits with 2: one line."""
    with pytest.raises(SystemExit) as stop:
        main(list(map(str, argv)))
    said = capsys.readouterr().err
    assert stop.value.code == 2
    assert said.count("\n") == 1
    return said


def test_import(source, tmp_path, capsys):
    assert main(["import", str(source), str(tmp_path / "net.msgpack")]) == 0
    got = jn.tools.read(tmp_path / "net.msgpack")
    np.testing.assert_array_equal(got["params"]["0"]["conv"]["kernel"], TORCH["0.conv.weight"].transpose(2, 3, 1, 0))
    np.testing.assert_array_equal(got["batch_stats"]["0"]["bn"]["var"], TORCH["0.bn.running_var"])
    table = capsys.readouterr().out
    row = next(line for line in table.splitlines() if line.startswith("0/bn"))
    assert row.split()[-5:] == ["0.9", "1e-05", "True", "False", "default"]  # torch's momentum=0.1, eps, Bessel


def test_import_and_back(source, tmp_path):
    main(["import", str(source), str(tmp_path / "net.msgpack")])
    main(["import", str(tmp_path / "net.msgpack"), str(tmp_path / "back.npz"), "--to", "torch"])
    back = jn.tools.read(tmp_path / "back.npz")
    for name in TORCH.keys() - {"0.bn.num_batches_tracked"}:  # Flax's momentum does not count updates
        np.testing.assert_array_equal(back[name], TORCH[name])


def test_import_takes_settings(source, tmp_path, capsys):
    main(["import", str(source), str(tmp_path / "net.msgpack"), "--epsilon", "1e-3", "--momentum", "0.97"])
    row = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("0/bn"))
    assert row.split()[-6:-4] == ["0.97", "0.001"]


@pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword")  # Keras's variables
def test_import_epsilon_is_of_all_norms_whatever_the_file_says(tmp_path, capsys):
    """A .keras file says its norms' epsilon; here its group norm is given another, too."""
    pytest.importorskip("h5py", reason="needs h5py")
    import os

    os.environ.setdefault("KERAS_BACKEND", "jax")
    keras = pytest.importorskip("keras", reason="keras is not installed")
    layers = [keras.layers.BatchNormalization(name="bn"), keras.layers.GroupNormalization(2, name="gn")]
    keras.Sequential([keras.Input((4,)), *layers]).save(tmp_path / "net.keras")
    for more, epsilon in (([], "0.001"), (["--epsilon", "1e-4"], "0.0001")):
        assert main(["import", str(tmp_path / "net.keras"), str(tmp_path / "net.npz"), *more]) == 0
        rows = [line.split() for line in capsys.readouterr().out.splitlines()]
        assert [epsilon in row for row in rows if row[0] in ("bn", "gn")] == [True, True]


def test_import_says_whose_a_file_is(source, tmp_path, capsys):
    from jaxnorm.lab import importing
    from jaxnorm.tools.models import FRAMEWORKS

    assert importing.FRAMEWORKS == FRAMEWORKS
    one = np.ones(3, np.float32)
    jn.tools.write(tmp_path / "none.npz", {"a.foo": one})
    out = tmp_path / "out.npz"
    said = fails(capsys, "import", tmp_path / "none.npz", out)
    assert "Give --from, one of flax, torch, keras, haiku, equinox, onnx." in said
    assert main(["import", str(tmp_path / "none.npz"), str(out), "--from", "torch"]) == 0
    assert "1 layer of torch into flax" in capsys.readouterr().out
    assert "argument --from: 'jax' is not" in fails(capsys, "import", source, out, "--from", "jax")
    ema = {"average": one, "hidden": one, "counter": np.array(3)}
    haiku = {"params": {"bn": {"scale": one, "offset": one}}, "state": {f"bn/~/{n}_ema": ema for n in ("mean", "var")}}
    jn.tools.write(tmp_path / "haiku.msgpack", haiku)
    assert "give --momentum DECAY_RATE." in fails(capsys, "import", tmp_path / "haiku.msgpack", out)
    assert main(["import", str(tmp_path / "haiku.msgpack"), str(out), "--momentum", "0.9"]) == 0


def test_fold(source, tmp_path, capsys):
    out = tmp_path / "folded.safetensors"
    pytest.importorskip("safetensors", reason="needs safetensors")
    assert main(["fold", str(source), str(out), "--pair", "*.bn=*.conv", "--epsilon", "0.01"]) == 0
    assert "1 of 1 norms folded" in capsys.readouterr().out
    got = jn.tools.read(out)
    scale = NORM["weight"] / np.sqrt(NORM["running_var"] + 0.01)
    assert sorted(got) == ["0.conv.bias", "0.conv.weight"]
    np.testing.assert_allclose(got["0.conv.weight"], TORCH["0.conv.weight"] * scale[:, None, None, None], rtol=1e-6)
    np.testing.assert_allclose(got["0.conv.bias"], NORM["bias"] - NORM["running_mean"] * scale, rtol=1e-5)


@pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword")  # Keras's variables
def test_fold_takes_what_a_keras_file_says(tmp_path, capsys):
    """Epsilon of each norm, and along which axis of a square kernel the outputs of a transposed convolution lie."""
    pytest.importorskip("h5py", reason="needs h5py")
    import os

    os.environ.setdefault("KERAS_BACKEND", "jax")
    keras = pytest.importorskip("keras", reason="keras is not installed")
    layers = keras.layers

    def net(*norms):
        up, conv = layers.Conv2DTranspose(4, 2, name="up"), layers.Conv2D(4, 2, name="conv")
        return keras.Sequential([keras.Input((3, 3, 4)), up, *norms[:1], conv, *norms[1:]])

    model = net(layers.BatchNormalization(epsilon=0.5, name="a"), layers.BatchNormalization(name="b"))
    for weight in model.weights:
        weight.assign(RNG.uniform(0.3, 2, weight.shape))
    model.save(tmp_path / "net.keras")
    command = ["fold", str(tmp_path / "net.keras"), str(tmp_path / "out.npz"), "--pair", "a=up", "--pair", "b=conv"]
    assert main(command) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [row[3:] for row in rows if row[0] in ("a", "b")] == [["0.5", "the", "file"], ["0.001", "the", "file"]]
    got = jn.tools.read(tmp_path / "out.npz")
    without = net()
    without.set_weights([got[f"{name}/{which}"] for name in ("up", "conv") for which in ("kernel", "bias")])
    x = RNG.normal(size=(2, 3, 3, 4)).astype(np.float32)
    np.testing.assert_allclose(np.asarray(without(x)), np.asarray(model(x)), rtol=1e-4)
    main([*command, "--epsilon", "0.25"])
    assert capsys.readouterr().out.count("0.25     --epsilon") == 2


def test_fold_says_whence_epsilon_is_and_what_it_cannot_see(tmp_path, capsys):
    square = {"0.conv.weight": np.ones((3, 3, 2, 2), np.float32)}
    jn.tools.write(tmp_path / "net.npz", TORCH | square)
    main(["fold", str(tmp_path / "net.npz"), str(tmp_path / "out.npz"), "--pair", "0.bn=0.conv"])
    row = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("0/bn"))
    said = "as many inputs as outputs: a transposed convolution would need --out-axis"
    assert row.split(None, 3)[3].split() == ["1e-05", "default", "of", "torch", *said.split()]
    jn.tools.write(tmp_path / "net.npz", TORCH | {"0.conv.kernel": np.ones((2, 3), np.float32)})
    said = fails(capsys, "fold", tmp_path / "net.npz", tmp_path / "out.npz", "--pair", "0.bn=0.conv")
    assert "do not tell whose the norms are, and so what epsilon is: say --epsilon." in said


def test_what_is_wrong_is_said_in_one_line(source, tmp_path, capsys):
    out = tmp_path / "out.npz"
    assert "there is no file" in fails(capsys, "import", tmp_path / "none.npz", out)
    assert "error: --where 'no' matches no layer" in fails(capsys, "import", source, out, "--where", "no")
    assert "--embedding 'no' matches no layer" in fails(capsys, "import", source, out, "--embedding", "no")
    assert "epsilon must be a number, not negative, got -5.0" in fails(capsys, "import", source, out, "--epsilon", "-5")
    assert "0 to 1, or None, got 2.0" in fails(capsys, "import", source, out, "--momentum", "2")
    assert "suffixes that can be written" in fails(capsys, "import", source, tmp_path / "out.txt")
    assert "argument --to" in fails(capsys, "import", source, out, "--to", "jax")
    assert "must be NORM=LAYER" in fails(capsys, "fold", source, out, "--pair", "bn")
    assert "matches no batch norm" in fails(capsys, "fold", source, out, "--pair", "bn=conv")
    assert "--pair" in fails(capsys, "fold", source, out)
    assert "epsilon must be a number" in fails(capsys, "fold", source, out, "--pair", "*.bn=*.conv", "--epsilon", "-1")
    assert "one norm is named twice" in fails(
        capsys, "fold", source, out, "--pair", "0.bn=0.conv", "--pair", "0.bn=0.conv"
    )
    assert "cannot write" in fails(capsys, "import", source, tmp_path / "no" / "out.npz")
    assert not out.exists()


@pytest.mark.parametrize("command", ["import", "fold"])
def test_help_teaches(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    assert "examples:" in capsys.readouterr().out
