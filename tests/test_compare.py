"""`jaxnorm compare` from the command line: what it shows, what it leaves, what it refuses, what Ctrl-C leaves."""

import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest

import jaxnorm
from jaxnorm.__main__ import main
from jaxnorm.lab import compare, options, train

FILES = ("results.json", "curves.png", "activations.png", "gradients.png")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A short run: the folder and results.json."""
    out = tmp_path_factory.mktemp("runs") / "short"
    flags = "--norms batch,none --depth 4 --epochs 4 --seeds 2 --batch-size 64 --quiet --out"
    assert main(["compare", *flags.split(), str(out)]) == 0
    return out, json.loads((out / "results.json").read_text())


def test_batch_norm_trains_the_deep_sigmoid_net_and_without_it_nothing_is_learned(finished):
    rows = {row["norm"]: row for row in finished[1]["table"]}
    assert rows["batch"]["test_accuracy"]["mean"] > 0.85  # 0.93 was measured
    assert rows["none"]["test_accuracy"]["mean"] < 0.2  # ten classes: 0.1 is chance
    assert rows["batch"]["seeds"] == 2


def test_the_gradients_show_why(finished):
    """Without a norm each sigmoid takes a factor from the gradient; with batch norm hardly."""
    for run in finished[1]["runs"]:
        first, *_, last = run["before"]["gradient_norms"]  # their ratio was 178 and 230, and 6 and 14
        assert last / first > 100 if run["norm"] == "none" else last / first < 30


def test_what_is_written(finished):
    out, results = finished
    for name in FILES[1:]:
        assert (out / name).read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in out.iterdir()) == sorted(FILES)
    assert set(results) == {"interrupted", "config", "versions", "device", "data", "quantiles", "runs", "table"}
    assert results["interrupted"] is False
    assert results["config"]["norms"] == ["batch", "none"]
    assert results["config"]["devices"] == 8
    assert results["versions"]["jaxnorm"] == jaxnorm.__version__
    assert results["versions"]["jax"] == jax.__version__
    assert results["data"] == {"train": 1438, "test": 359, "shape": [8, 8, 1], "classes": 10}
    assert [(run["norm"], run["seed"]) for run in results["runs"]] == [
        ("batch", 0), ("batch", 1), ("none", 0), ("none", 1),
    ]  # fmt: skip
    for run in results["runs"]:
        assert len(run["curve"]) == 4
        assert {point["test_count"] for point in run["curve"]} == {359}
        for look in (run["before"], run["after"]):
            assert len(look["gradient_norms"]) == 4
            assert np.shape(look["quantiles"]) == (4, len(results["quantiles"]))
            assert (np.diff(look["quantiles"], axis=1) >= 0).all()


def test_the_table_is_the_mean_and_spread_over_the_seeds(finished):
    results = finished[1]
    for row in results["table"]:
        last = [run["curve"][-1]["test_loss"] for run in results["runs"] if run["norm"] == row["norm"]]
        assert row["test_loss"]["mean"] == pytest.approx(np.mean(last))
        assert row["test_loss"]["std"] == pytest.approx(abs(last[0] - last[1]) / np.sqrt(2))


def test_ctrl_c_leaves_what_there_is(tmp_path, monkeypatch, capsys):
    epochs = []
    one_epoch = train.one_epoch

    def until_the_sixth(*args):
        epochs.append(args)
        if len(epochs) == 6:
            raise KeyboardInterrupt
        return one_epoch(*args)

    monkeypatch.setattr(train, "one_epoch", until_the_sixth)
    flags = "compare --norms none,batch --depth 4 --epochs 4 --seeds 1 --batch-size 64 --out"
    assert main([*flags.split(), str(tmp_path)]) == 130
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["interrupted"] is True
    assert [(run["norm"], len(run["curve"]), run["after"] is None) for run in results["runs"]] == [
        ("none", 4, False), ("batch", 1, True),
    ]  # fmt: skip
    assert [row["norm"] for row in results["table"]] == ["none"]
    assert results["table"][0]["loss"]["std"] is None  # one seed has no spread
    shown = capsys.readouterr().out
    for name in FILES:
        assert (tmp_path / name).exists()
        assert str(tmp_path / name) in shown


def npz(path: Path, **arrays) -> str:
    np.savez(path, **arrays)
    return str(path)


X, Y = np.random.default_rng(0).random((40, 4, 4)), np.arange(40) % 2

BAD = {  # arguments, and what the line must say
    "norm": (["--norms", "batch,lyer"], "--norms: 'lyer' is not one of batch, layer, .*did you mean 'layer'"),
    "norms empty": (["--norms", ""], "--norms: '' is not one of"),
    "norm twice": (["--norms", "rms,rms"], "--norms: names a norm twice"),
    "devices": (["--devices", "0"], "--devices: must be a whole number from 1, got '0'"),
    "batch and devices": (["--devices", "3"], "--batch-size: 128 is not a multiple of the 3 devices"),
    "batch and default devices": (["--batch-size", "20"], "--batch-size: 20 is not a multiple of the 8 devices"),
    "batch": (["--batch-size", "8.5"], "--batch-size: must be a whole number from 1, got '8.5'"),
    "batch too large": (["--batch-size", "1600"], "--batch-size: 1600 is more than the 1438 training examples"),
    "epochs": (["--epochs", "-1"], "--epochs: must be a whole number from 1, got '-1'"),
    "seeds": (["--seeds", "²"], "--seeds: must be a whole number from 1"),
    "rate": (["--learning-rate", "-0.1"], "--learning-rate: must be a number above 0, got '-0.1'"),
    "rate nan": (["--learning-rate", "nan"], "--learning-rate: must be a number above 0, got 'nan'"),
    "rate word": (["--learning-rate", "fast"], "--learning-rate: must be a number above 0, got 'fast'"),
    "depth": (["--depth", "0"], "--depth: must be a whole number from 1, got '0'"),
    "activation": (["--activation", "tanh"], "--activation: 'tanh' is not one of sigmoid, relu"),
    "unknown": (["--batchsize", "64"], "unrecognized arguments: --batchsize"),
    "dataset": (["--dataset", "mnist"], "--dataset: 'mnist' is not digits, fashion-mnist or a path that ends in .npz"),
    "no npz": (["--dataset", "no.npz"], "--dataset: 'no.npz' is not a file; write one with numpy.savez"),
    "data": (["--data", "."], "--data: goes with --dataset fashion-mnist, not with 'digits'"),
    "no fashion": (["--dataset", "fashion-mnist", "--data", "no"], "has no file 'no/train.*apt-get .*--data DIR"),
}

BAD_ARRAYS = {
    "no y": ({"x": X}, "has no array x or no array y"),
    "pickled": ({"x": X, "y": np.array([None] * 40)}, "is not a readable .npz file"),
    "x 2-d": ({"x": X[0], "y": Y[:4]}, r"has x of shape \(4, 4\) and dtype float64; wanted \(n, h, w\)"),
    "x 0-d": ({"x": X[0, 0, 0], "y": Y}, r"has x of shape \(\)"),
    "x complex": ({"x": X + 1j, "y": Y}, "has x of .* dtype complex128"),
    "y float": ({"x": X, "y": Y + 0.5}, r"has y of .* dtype float64; wanted \(40,\) integers"),
    "y short": ({"x": X, "y": Y[:39]}, r"has y of shape \(39,\)"),
    "empty": ({"x": X[:0], "y": Y[:0]}, r"has x of shape \(0, 4, 4\); wanted five or more"),
    "no pixels": ({"x": X[:, :0], "y": Y}, r"has x of shape \(40, 0, 4\)"),
    "one class": ({"x": X, "y": Y * 0 + 7}, "has one class only, y = 7"),
    "nan": ({"x": np.where(X < 0.1, np.nan, X), "y": Y}, "has NaN or infinity in x"),
    "large": ({"x": X * 1e300, "y": Y}, "too large for float32"),
    "constant": ({"x": X * 0, "y": Y}, "has the same number in all of x"),
    "few": ({"x": X, "y": Y}, "--batch-size: 128 is more than the 32 training examples"),
}


@pytest.fixture
def refused(monkeypatch, capsys, tmp_path):
    """Runs a command that must end with status 2 and one line on stderr, before any training; the line."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(compare, "train_all", lambda *args: pytest.fail("reached the training"))

    def run(*args: str) -> str:
        with pytest.raises(SystemExit) as stop:
            main(["compare", *args])
        streams = capsys.readouterr()
        assert stop.value.code == 2
        assert streams.out == ""
        assert streams.err.count("\n") == 1
        assert not (tmp_path / "runs").exists()
        return streams.err

    return run


@pytest.mark.parametrize("case", BAD)
def test_bad_values(case, refused):
    args, message = BAD[case]
    assert re.search(message, refused(*args))


@pytest.mark.parametrize("case", BAD_ARRAYS)
def test_bad_arrays(case, refused, tmp_path):
    arrays, message = BAD_ARRAYS[case]
    assert re.search(message, refused("--dataset", npz(tmp_path / "bad.npz", **arrays)))


def test_what_is_no_npz_file(refused, tmp_path):
    np.save(tmp_path / "array.npy", X)
    (tmp_path / "array.npy").rename(tmp_path / "array.npz")
    assert re.search("is not a readable .npz file: File is not a zip file", refused("--dataset", "array.npz"))


def test_out_that_cannot_be_written(refused, tmp_path):
    (tmp_path / "file").touch()
    assert re.search("--out: cannot write to 'file/run': Not a directory", refused("--out", "file/run"))
    assert re.search("--out: cannot write to 'file': File exists", refused("--out", "file"))


def test_more_devices_than_there_are(refused, monkeypatch):
    assert re.search("--devices: 16 wanted, cpu has 8; JAX was started before", refused("--devices", "16"))
    gpus = [SimpleNamespace(platform="gpu", process_index=0)] * 3
    monkeypatch.setattr(jax, "devices", lambda: gpus)
    assert re.search("--devices: 4 wanted, gpu has 3; JAX_PLATFORMS=cpu simulates", refused("--devices", "4"))
    assert re.search("--batch-size: 128 is not a multiple of the 3 devices", refused())


def test_the_extra_that_is_missing(refused, monkeypatch):
    monkeypatch.setattr(options.importlib.util, "find_spec", lambda name: None)
    assert re.search(r'needs matplotlib, rich, which is not installed: pip install "jaxnorm\[lab\]"', refused())


def test_help_teaches(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["compare", "--help"])
    text = capsys.readouterr().out
    for name in options.Options.__dataclass_fields__:
        assert f"--{name.replace('_', '-')}" in text
    assert text.count("\n  jaxnorm compare") >= 4


def test_every_example_of_the_help_is_accepted(monkeypatch, refused):
    monkeypatch.setattr(compare, "run", lambda options: 0)
    commands = [line.split() for line in options.DESCRIPTION["epilog"].splitlines() if line.startswith("  jaxnorm")]
    assert all(main(command[1:]) == 0 for command in commands)


def test_as_a_module():
    """In its own process, where main() is not called by a test."""
    version = subprocess.run([sys.executable, "-m", "jaxnorm", "--version"], capture_output=True, text=True, check=True)
    assert version.stdout == f"jaxnorm {jaxnorm.__version__}\n"
