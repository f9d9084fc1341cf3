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


def test_what_is_wrong_is_said_in_one_line(source, tmp_path, capsys):
    out = tmp_path / "out.npz"
    assert "there is no file" in fails(capsys, "import", tmp_path / "none.npz", out)
    assert "'no' matches no" in fails(capsys, "import", source, out, "--where", "no")
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
