"""`jaxnorm bench`: every framework computes the same, the arithmetic by hand, and what the command leaves and refuses.

A framework that computed something else would be timed for something else.
"""

import json
import os
import re
import sys
from types import SimpleNamespace

import jax
import numpy as np
import pytest
import reference

from jaxnorm.__main__ import main
from jaxnorm.lab.bench import cases, command, options, peers, report, resnet, timing, tiny

LEFT_OUT = peers.left_out(options.PEERS)
SHAPES = {"batch": (2, 3, 2, 4), "layer": (2, 3, 8), "rms": (6, 8), "instance": (2, 3, 2, 4), "group": (2, 2, 2, 64)}
OVER = {
    "batch": ("... c", "..."),
    "layer": ("... c", "c"),
    "rms": ("... c", "c"),
    "instance": ("n ... c", "..."),
    "group": ("n ... (g m)", "... m"),
}
LIMITS = {"float32": 2e-5, "bfloat16": 6e-2}  # of numbers up to 4: bfloat16 has eight bits


@pytest.fixture(autouse=True)
def defaults():
    """The other frameworks count on JAX's own promotion."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def number(z):
    return np.asarray(z.float() if hasattr(z, "detach") else z, np.float64)


def averaged(z, norm):
    """The mean of z over what the norm averages, broadcast to z."""
    layout, over = OVER[norm]
    open_, names = reference.open_up(z, layout, {"g": peers.GROUPS})
    axes = tuple(names.index(name) for name in reference.select(names, over))
    return np.broadcast_to(open_.mean(axes, keepdims=True), open_.shape).reshape(z.shape)


def expected_gradients(norm, x, scale, g, epsilon):
    """Of x, scale and bias. Of x: the gradient of z without its mean and without its part along z, by the deviation."""
    centred = x - (averaged(x, norm) if norm != "rms" else 0)
    deviation = np.sqrt(averaged(centred**2, norm) + epsilon)
    z, dz = centred / deviation, g * scale
    dx = (dz - (averaged(dz, norm) if norm != "rms" else 0) - z * averaged(dz * z, norm)) / deviation
    rows = tuple(range(x.ndim - 1))
    return dx, (g * z).sum(rows), g.sum(rows) if norm != "rms" else np.zeros_like(scale)


def expected_state(peer, mean, var, count):
    """After one step from 0 and 1. Haiku divides the start out, torch has Bessel's correction."""
    kept = 0.0 if peer == "haiku" else peers.MOMENTUM
    return (1 - kept) * mean, kept + (1 - kept) * var * (count / (count - 1) if peer == "torch" else 1)


ALONE = ("jaxnorm", "torch")  # of the others batch norm stands for all in bfloat16: each case compiles for long
CASES = [
    (peer, norm, dtype)
    for peer in peers.BUILD
    for norm in options.NORMS
    for dtype in options.DTYPES
    if dtype == "float32" or norm == "batch" or peer in ALONE
]


@pytest.mark.parametrize(("peer", "norm", "dtype"), CASES)
def test_every_framework_computes_the_same(peer, norm, dtype):
    if peer in LEFT_OUT:
        pytest.skip(f"{peer}: {LEFT_OUT[peer]}")
    arrays = cases.make_arrays(SHAPES[norm], dtype)
    x, scale, bias, g = map(number, arrays)
    layout, over = OVER[norm]
    affine = {"scale": scale, "bias": None if norm == "rms" else bias}
    affine["features"] = "g m" if norm == "group" else "c"
    sizes = {"g": peers.GROUPS} if norm == "group" else None
    center = norm != "rms"
    y, stats = reference.standardize(x, layout, over, center=center, sizes=sizes, epsilon=peers.EPSILON, **affine)

    calls = peers.calls(peer, norm, arrays)
    made, state = calls.forward()
    assert str(made.dtype).removeprefix("torch.") == dtype
    np.testing.assert_allclose(number(made), y, rtol=LIMITS[dtype], atol=LIMITS[dtype])
    if norm == "batch":
        rough = dtype == "bfloat16" and peer in ("haiku", "equinox")  # their statistics are bfloat16 as well
        limit = LIMITS["bfloat16" if rough else "float32"]
        wanted = expected_state(peer, stats.mean, stats.var, stats.count)
        for found, want in zip(state, wanted, strict=True):
            np.testing.assert_allclose(number(found).ravel(), want, rtol=limit, atol=limit)
    else:
        assert state == ()

    made, _, gradients = calls.backward()
    np.testing.assert_allclose(number(made), y, rtol=LIMITS[dtype], atol=LIMITS[dtype])
    for found, want in zip(gradients, expected_gradients(norm, x, scale, g, peers.EPSILON), strict=True):
        limit = 4 * LIMITS[dtype]  # sums of up to 24 products
        np.testing.assert_allclose(number(found), want, rtol=limit, atol=limit)


def test_times_the_limit_by_hand():
    # A copy of x moves 2 x in 1 ms. Layer norm moves 2 x forward, 5 x in all: 1 ms and 2.5 ms; batch norm 3 x and 8 x
    assert timing.times_limit(3e-3, 1e-3, "layer", "forward") == pytest.approx(3)
    assert timing.times_limit(5e-3, 1e-3, "group", "backward") == pytest.approx(2)
    assert timing.times_limit(3e-3, 1e-3, "batch", "forward") == pytest.approx(2)
    assert timing.times_limit(4e-3, 1e-3, "batch", "backward") == pytest.approx(1)


def test_interleaved_leaves_the_warm_up_out_and_divides_by_the_calls(monkeypatch):
    rounds = 100, 100, 2, 8, 4  # seconds; the first two warm up
    clock = iter(np.cumsum([[0, seconds] for seconds in rounds]).tolist())
    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    called = []
    found = timing.interleaved({"f": (lambda: called.append(1), lambda _: None)}, runs=3, calls=2)
    assert found["f"] == (1.0, 2.0)
    assert len(called) == 2 * (timing.WARM_UP + 3)


def row(peer, shape, ms, times=1.0):
    return {"norm": "rms", "dtype": "float32", "way": "forward", "peer": peer, "shape": shape, "min_ms": ms} | {
        "times_limit": times
    }


def test_means_over_the_shapes_by_hand():
    rows = [row("flax.linen", (1,), 8.0), row("jaxnorm", (1,), 1.0, 2.0)]
    rows += [row("flax.linen", (2,), 1.0), row("jaxnorm", (2,), 2.0, 8.0)]
    (found,) = report.speedups(rows)
    assert (found["mean"], found["worst"], found["worst_shape"]) == (pytest.approx(2), 0.5, (2,))  # sqrt(8 * 1/2)
    limits = {row["peer"]: row["times_limit"] for row in report.limits(rows)}
    assert limits == {"flax.linen": pytest.approx(1), "jaxnorm": pytest.approx(4)}  # sqrt(2 * 8)


def test_compile_ratios_by_hand():
    rows = [{"peer": "flax.linen", "trace_min_s": 1.0, "compile_min_s": 4.0}]
    rows += [{"peer": "jaxnorm", "trace_min_s": 2.0, "compile_min_s": 4.0}]
    assert report.compile_ratios(rows) == {"trace": 2.0, "compile": 1.0, "together": pytest.approx(1.2)}


def test_shapes_grow_with_mb():
    for norm, shapes in cases.SHAPES.items():
        for shape in shapes:
            assert np.prod(shape) * 4 == pytest.approx(16 * 2**20, rel=0.05), (norm, shape)
    assert cases.scaled((64, 32, 32, 64), 256) == (1024, 32, 32, 64)
    assert cases.scaled((64, 32, 32, 64), 0.01) == (1, 32, 32, 64)


def test_the_resnet_has_53_norms_and_both_nets_the_same_variables():
    x = jax.ShapeDtypeStruct((2, 32, 32, 3), np.float32)
    nets = [jax.eval_shape(resnet.ResNet(norm).init, jax.random.key(0), x) for norm in resnet.NORMS.values()]
    assert jax.tree.map(lambda z: z.shape, nets[0]) == jax.tree.map(lambda z: z.shape, nets[1])
    means = [z for path, z in jax.tree.leaves_with_path(nets[0]["batch_stats"]) if path[-1].key == "mean"]
    assert (len(means), sum(z.size for z in means)) == (53, 26560)


SHORT = ["--norms", "layer", "--dtypes", "float32", "--peers", "flax.linen", "--mb", "0.1", "--runs", "2", "--out"]


@pytest.fixture
def small(monkeypatch):
    """A net of one norm instead of 53."""
    measure = resnet.measure
    monkeypatch.setattr(resnet, "measure", lambda **kw: measure((), **kw))
    monkeypatch.setattr(resnet, "RUNS", 1)


def test_what_is_written_and_shown(small, tmp_path, capsys):
    assert main(["bench", *SHORT, str(tmp_path)]) == 0
    path, picture = sorted(tmp_path.iterdir())
    results = json.loads(path.read_text())
    assert path.name == f"{results['date'][:10]}-cpu.json"
    assert picture == path.with_suffix(".png")
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert results["interrupted"] is False
    assert results["machine"]["cores"] == peers.cores()
    assert results["versions"]["jax"] == jax.__version__
    assert results["options"]["mb"] == 0.1
    assert [(of["dtype"], of["mb"]) for of in results["copy_bandwidth"]] == [
        ("float32", pytest.approx(size * 4 / 1e6)) for size in (51 * 512, 512 * 512, 26 * 1024)
    ]
    for copied, ours in ((a, b) for a in results["measurements"] for b in results["measurements"]):
        if copied["peer"] == "copy" and ours["peer"] == "jaxnorm" and copied["shape"] == ours["shape"]:
            streams = {"forward": 2, "backward": 5}[ours["way"]]
            seconds = streams * 4 * np.prod(ours["shape"]) / (copied["gb_per_s"] * 1e9)
            assert ours["times_limit"] == pytest.approx(ours["min_ms"] / 1e3 / seconds)
    assert len(results["measurements"]) == 3 * (1 + 2 * 2)
    assert all(of["min_ms"] <= of["median_ms"] for of in results["measurements"])
    assert [(of["norm"], of["way"]) for of in results["flax_linen_by_ours"]] == [("layer", w) for w in timing.WAYS]
    assert len(results["tiny"]) == 2 * 2 * 2
    assert [of["peer"] for of in results["compile"]] == list(resnet.NORMS)
    shown = capsys.readouterr().out
    for caption in ("times the limit", "time of flax.linen / ours", "tiny inputs", "a training step of ResNet-50"):
        assert caption in shown
    assert str(path) in shown
    assert str(picture) in shown


def test_ctrl_c_leaves_what_there_is(tmp_path, monkeypatch, capsys):
    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(tiny, "measure", interrupt)
    assert main(["bench", *SHORT, str(tmp_path)]) == 130
    results = json.loads(next(tmp_path.glob("*.json")).read_text())
    assert results["interrupted"] is True
    assert results["times_limit"]
    assert results["tiny"] == []
    assert "interrupted" in capsys.readouterr().err


def test_a_framework_that_fails_costs_no_other_its_results(tmp_path, monkeypatch, capsys):
    def fail(*args):
        raise RuntimeError("RESOURCE_EXHAUSTED: out of memory\nand more")

    monkeypatch.setattr(tiny, "measure", fail)
    assert main(["bench", *SHORT, str(tmp_path)]) == 1
    results = json.loads(next(tmp_path.glob("*.json")).read_text())
    assert results["interrupted"] is True
    assert results["times_limit"]
    (said,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("jaxnorm bench"))
    assert said == "jaxnorm bench: RuntimeError: RESOURCE_EXHAUSTED: out of memory; writing what there is"


def test_a_missing_framework_is_named_once(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "haiku", None)  # as where it is not installed
    flags = ["--norms", "rms", "--dtypes", "float32", "--peers", "haiku", "--parts", "norms", "--mb", "0.01"]
    assert main(["bench", *flags, "--runs", "1", "--out", str(tmp_path)]) == 0
    results = json.loads(next(tmp_path.glob("*.json")).read_text())
    assert results["left_out"] == {"haiku": "not installed"}
    assert {of["peer"] for of in results["measurements"]} == {"copy", "jaxnorm"}
    assert results["flax_linen_by_ours"] == []
    assert capsys.readouterr().out.count("haiku") == 1


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (["--norms", "lyer"], "--norms: 'lyer' is not one of batch, layer, .*did you mean 'layer'"),
        (["--norms", "rms,rms"], "--norms: names a norm twice"),
        (["--norms", ""], "--norms: '' is not one of"),
        (["--dtypes", "float64"], "--dtypes: 'float64' is not one of float32, bfloat16"),
        (["--peers", "flax"], "--peers: 'flax' is not one of flax.linen"),
        (["--parts", "all"], "--parts: 'all' is not one of norms, tiny, compile"),
        (["--mb", "0"], "--mb: must be a number above 0, got '0'"),
        (["--runs", "0"], "--runs: must be a whole number from 1, got '0'"),
        (["--run", "3"], "unrecognized arguments: --run"),
        (["--out", __file__], "--out: cannot write to"),
    ],
)
def test_a_bad_value_is_one_line_and_exit_2(flags, line, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["bench", *flags])
    assert stopped.value.code == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert re.search(line, said)


def test_it_starts_itself_once_more_as_it_was_called(monkeypatch):
    started = []
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(sys, "orig_argv", ["python", "-m", "jaxnorm", "bench", "--runs", "3"])
    monkeypatch.setattr(os, "execve", lambda *args: started.append(args))
    for name in command.ALLOCATOR:
        monkeypatch.delenv(name, raising=False)
    command.restart()
    ((program, args, environ),) = started
    assert program == sys.executable
    assert args == [sys.executable, "-m", "jaxnorm", "bench", "--runs", "3"]
    assert command.ALLOCATOR.items() <= environ.items()
    for name, value in command.ALLOCATOR.items():
        monkeypatch.setenv(name, value)
    command.restart()
    assert len(started) == 1


def test_the_mean_that_is_asked_for_is_timed(monkeypatch):
    seen = []
    monkeypatch.setattr(cases.peers, "calls", lambda name, norm, arrays: seen.append(arrays) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        cases.measure("batch", "float32", (4096, 8), ("jaxnorm",), 1, 3.0)
    np.testing.assert_allclose(np.mean(seen[0][0]), 3, atol=0.05)
