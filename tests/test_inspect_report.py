"""`jn.inspect.report`: each rule on both sides of its line, in the trees of every library, and nothing said of our own
norms."""

import family_modules
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jaxnorm as jn
import jaxnorm.nnx as jx
from jaxnorm.errors import ArgumentError
from jaxnorm.tools.files import flat

N = 4


def norm(**values):
    """A batch norm that is well, in float32, but for what is given. None leaves a variable out."""
    own = {"scale": [0.5, 0.8, 1.1, 1.3], "bias": [0.1, -0.2, 0.3, 0.0], "mean": [0.2, -1.0, 3.0, 0.5],
           "var": [0.5, 1.0, 2.0, 9.0]} | values  # fmt: skip
    return {k: v if hasattr(v, "dtype") else np.array(v, np.float32) for k, v in own.items() if v is not None}


def tree(**norms):
    """As Flax lays it out: {"params", "batch_stats"}."""
    out = {"params": {}, "batch_stats": {}}
    for name, values in norms.items():
        for key, value in values.items():
            out["params" if key in ("scale", "bias") else "batch_stats"].setdefault(name, {})[key] = value
    return out


def found(variables, **settings):
    """{norm: (grade, finding)} of what has a finding."""
    health = jn.inspect.report(variables, **settings)
    return {row["norm"]: (row["grade"], row["finding"]) for row in health if row["grade"]}


# --- one norm: what is said of it beside another that is well


WRONG = {
    "nan": ({"mean": [np.nan, 0, 0, 1]}, "1 of 4 entries of mean are NaN or infinite"),
    "inf scale": ({"scale": [np.inf, 1, -np.inf, 1]}, "2 of 4 entries of scale are NaN or infinite"),
    "float16 overflow": ({"var": np.array([np.inf, 1, 1, 1], np.float16)}, "1 of 4 entries of var are NaN or infinite"),
    "negative": ({"var": [1, -1e-9, 2, 3]}, "1 of 4 variances are negative"),
    "integer": ({"mean": np.array([1, 2, 3, 4])}, "mean is stored as int64, which has no fractions"),
    "shape": ({"mean": [1, 2, 3], "var": [1, 2, 3]}, "scale has shape (4,), mean (3,): of different layers?"),
    "mean and var": ({"var": [1, 2]}, "mean has shape (4,), var (2,): of different layers?"),
    "bias": ({"bias": [1, 2]}, "scale has shape (4,), bias (2,): of different layers?"),
    "no var": ({"var": None}, "it has mean but no var"),
    "no mean": ({"mean": None}, "it has var but no mean"),
    "no var, no parameters": ({"var": None, "scale": None, "bias": None}, "it has mean but no var"),
    "collapsed": ({"var": [1e-13, 0, 1, 2]}, "2 of 4 variances are below 1e-12: its inputs do not vary"),
    "huge var": ({"var": [1, 1, 1, 1.01e12]}, "diverged: means up to 3, variances up to 1e+12"),
    "huge mean": ({"mean": [0, 0, -1.01e8, 1]}, "diverged: means up to 1e+08, variances up to 9"),
    "dead": ({"scale": [0, 1e-7, 1, 2]}, "2 of 4 scales are 0 though its bias is trained"),
    "never updated": ({"mean": [0] * N, "var": [1] * N}, "never updated (mean 0, var 1), where other was"),
}  # fmt: skip
NOTE = {
    "one below epsilon": ({"var": [0.9e-5, 1, 1, 1]}, "1 of 4 variances are below epsilon = 1e-05, which sets"),
    "one collapsed": ({"var": [0, 1, 1, 1]}, "1 of 4 variances are below epsilon = 1e-05, which sets"),
    "denormal": ({"var": [1e-44, 1, 1, 1]}, "1 of 4 variances are below epsilon = 1e-05 (1 denormal)"),
    "faint": ({"scale": [0.9e-3, 1, 1, 0.5]}, "1 of 4 scales are below 0.001 of the largest"),
    "zero scale": ({"scale": [0] * N, "bias": [0] * N}, "all scales are 0, as at the start of a residual branch"),
    "bfloat16": ({"mean": np.asarray(jnp.ones(N, jnp.bfloat16))}, "mean is stored as bfloat16: training on loses"),
}
NOTHING = {
    "well": {},
    "at epsilon": {"var": [1.1e-5, 1, 1, 1]},
    "large": {"var": [0.9e12, 1, 1, 1], "mean": [0.9e8, 1, 1, 1]},
    "at a thousandth": {"scale": [1.1e-3, 1, 1, 0.5]},
    "no scale": {"scale": None, "bias": None},
    "bias alone": {"scale": None},
    "complex": {"mean": np.array([1 + 1j, 2, 3, 4], np.complex64)},
    "of classes": {"scale": np.ones((3, N), np.float32), "bias": np.ones((3, N), np.float32)},  # conditional
    "flat": {"scale": np.ones((2, 2), np.float32), "bias": np.ones((2, 2), np.float32)},  # nnx keeps statistics flat
    "no elements": {name: np.zeros(0, np.float32) for name in ("scale", "bias", "mean", "var")},
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong(case):
    values, said = WRONG[case]
    out = found(tree(bn=norm(**values), other=norm()))
    assert out.keys() == {"bn"}
    assert out["bn"][0] == "wrong"
    assert said in out["bn"][1]


@pytest.mark.parametrize("case", NOTE)
def test_what_is_worth_a_note(case):
    values, said = NOTE[case]
    out = found(tree(bn=norm(**values), other=norm()))
    assert out.keys() == {"bn"}
    assert out["bn"][0] == "note"
    assert said in out["bn"][1]


@pytest.mark.parametrize("case", NOTHING)
def test_what_is_not_worth_a_word(case):
    assert found(tree(bn=norm(**NOTHING[case]), other=norm())) == {}


def test_several_findings_of_one_norm_the_worst_first():
    row = jn.inspect.report(tree(bn=norm(var=[0, 0, 0, 2e12], scale=[1e-5, 1, 1, 1]))).rows[0]
    assert row["grade"] == "wrong"
    assert [part.split(":")[0] for part in row["finding"].split("; ")] == [
        "3 of 4 variances are below 1e-12", "diverged", "1 of 4 scales are below 0.001 of the largest",
    ]  # fmt: skip


# --- updates


@pytest.mark.parametrize(
    ("updates", "momentum", "grade"),
    [(0, 0.9, ""), (6, 0.9, "wrong"), (7, 0.9, "note"), (28, 0.9, "note"), (29, 0.9, ""), (3, None, ""), (3, 0.0, "")],
)
def test_what_is_left_of_the_initial_statistics(updates, momentum, grade):
    """0.9^6 = 0.531, 0.9^7 = 0.478; 0.9^28 = 0.0523, 0.9^29 = 0.0471. Half of it is left after log 0.5 / log 0.9 = 6.6.
    A count of 0 beside statistics that have moved is that of a converter, which counts nothing.
    Where no norm counts, the steps of the training state do, or those that are told."""
    variables = tree(bn=norm(num_updates=np.array(updates, np.int32)))
    if updates == 0:
        assert found(variables) == {}
        said = {"bn": ("note", "its count is 0, its statistics are not the initial ones")}
        assert found(variables, momentum=momentum) == said
        return
    out = found(variables, momentum=momentum)
    plain, adam = tree(bn=norm()), {"0": {"count": np.array(updates, np.int32)}}
    assert found(plain, momentum=momentum, updates=updates) == out
    for state in ({"step": np.array(updates)}, {"step": updates}, {"opt_state": adam}, {"optimizer": adam}):
        assert found({**plain, **state}, momentum=momentum) == out
        assert found({**plain, **state}, momentum=momentum, updates=10**6) == {}
    assert out.get("bn", ("",))[0] == grade
    assert found(variables, momentum=momentum, debias=True) == {}
    if grade:
        share = f"{round(100 * 0.9**updates)}%"
        said = f"{updates} updates, half-life at momentum 0.9 is 7: still {share} of the initial 0 and 1"
        assert out["bn"][1] == said


def test_momentum_that_tells_nothing():
    """Flax's norms count nothing, and the count of a dropout is no optimizer's."""
    said = "; momentum needs the number of updates, which nothing here counts: give `updates`"
    plain = tree(bn=norm())
    for more in ({}, {"rngs": {"count": np.array(9)}}, {"step": np.array([3])}, {"step": "3"}):
        assert jn.inspect.report({**plain, **more}, momentum=0.9).title == "1 norm: 0 wrong, 0 with notes" + said
    for variables in (tree(bn=norm(num_updates=np.array(3))), {**plain, "step": 3}, tree(ln=norm(mean=None, var=None))):
        assert said not in jn.inspect.report(variables, momentum=0.9).title
    assert said not in jn.inspect.report(plain, momentum=0.9, debias=True).title
    for updates in (5, np.int64(5), jnp.array(5)):
        assert "5 updates, half-life" in found(plain, momentum=0.9, updates=updates)["bn"][1]
        assert said not in jn.inspect.report(plain, momentum=0.9, updates=updates).title


def test_haiku_debiases_what_it_reads():
    hidden = {"hidden": np.full(N, 0.3, np.float32), "average": np.full(N, 0.6, np.float32), "counter": np.array(1)}
    params = {"net/bn": {"scale": np.ones(N), "offset": np.zeros(N)}}
    trees = params, {"net/bn/~/mean_ema": hidden, "net/bn/~/var_ema": hidden}
    assert found(trees, momentum=0.9) == {}
    fresh = {"hidden": np.zeros(N), "average": np.zeros(N), "counter": np.array(0)}
    out = found((params, {"net/bn/~/mean_ema": fresh, "net/bn/~/var_ema": fresh}), momentum=0.9)
    assert out["net/bn"][0] == "note"  # a variance of 0 is what Haiku starts from
    assert "never updated" in out["net/bn"][1]


FRESH = {"scale": [1] * N, "bias": [0] * N, "mean": [0] * N, "var": [1] * N}


def test_a_fresh_model_is_no_fault_and_a_trained_one_without_updates_is():
    out = found(tree(a=norm(**FRESH), b=norm(**FRESH | {"scale": [0] * N})))
    assert {grade for grade, _ in out.values()} == {"note"}
    assert "like a model that is not trained yet" in out["a"][1]
    out = found(tree(a=norm(**FRESH), b=norm(**FRESH | {"bias": [0, 0.1, 0.2, 0]})))
    assert {name: grade for name, (grade, _) in out.items()} == {"a": "wrong", "b": "wrong"}
    assert "though b is trained: was the new state thrown away?" in out["a"][1]
    layer_norm = norm(scale=[0.9, 1, 1, 1], mean=None, var=None)
    assert found(tree(a=norm(**FRESH), ln=layer_norm))["a"][0] == "wrong"
    bare = norm(**FRESH | {"scale": None, "bias": None})  # nothing shows that it was trained but the steps
    assert found({**tree(a=bare), "step": np.array(5000)}) == {
        "a": ("wrong", "never updated (mean 0, var 1), after 5000 steps")
    }
    assert found({**tree(a=bare), "step": np.array(0)})["a"][0] == "note"
    assert found(tree(a=bare), updates=5000)["a"][0] == "wrong"
    assert "though it counts 7 updates" in found(tree(a=norm(**FRESH, num_updates=np.array(7))))["a"][1]


def test_whitening():
    cov, mean = np.eye(N, dtype=np.float32) * 2 + np.float32(0.1), np.ones(N, np.float32)
    white = {"batch_stats": {"w": {"mean": mean, "cov": cov, "num_updates": np.array(100)}}}
    assert found(white) == {}
    row = jn.inspect.report(white).rows[0]
    assert row["var max"] == pytest.approx(2.1)  # the diagonal
    fresh = {"batch_stats": {"w": {"mean": mean * 0, "cov": np.eye(N), "num_updates": np.array(0)}}}
    assert found(fresh)["w"][0] == "note"
    cov[1, 2] = np.nan
    assert found(white)["w"] == ("wrong", "1 of 16 entries of cov are NaN or infinite")


# --- names


def test_statistics_that_are_lost():
    lost = norm(mean=None, var=None)
    assert found(tree(bn_0=norm(), BatchNorm_1=lost)) == {
        "BatchNorm_1": ("wrong", "no statistics, though it is called BatchNorm_1")
    }
    assert found(tree(norm_0=norm(), norm_1=norm(), norm_2=lost)) == {
        "norm_2": ("note", "no statistics, where norm_0 and all like it have them")  # or group norm, on purpose
    }
    assert found(tree(norm_0=norm(), norm_1=lost, norm_2=lost)) == {}  # a net with both kinds of norm
    assert found(tree(norm_0=norm(), norm_1=norm(), norm_2=norm(mean=None, var=None, bias=None))) == {}  # RMS norm
    for name in ("ln", "VirtualBatchNorm_0", "virtual_batch_norm", "subnet", "batch_embedding"):
        assert found(tree(norm_0=norm(), norm_1=norm(), **{name: lost})) == {}
    said = "no statistics, though it is called bn: were only the parameters saved?"
    assert found(tree(bn=lost))["bn"] == ("wrong", said)
    torch = {"bn1.weight": np.ones(N), "bn1.bias": np.zeros(N)}
    assert found(torch)["bn1"] == ("note", "no statistics, though it is called bn1: track_running_stats=False?")


def test_statistics_under_another_name():
    """Parameters stayed or moved, statistics did not: both are named."""
    alone, lost = norm(scale=None, bias=None), norm(mean=None, var=None)
    out = found(tree(bn_0=norm(), bn2=lost, bn_2=alone, ln=lost))
    assert out == {
        "bn2": ("wrong", "parameters without statistics, and bn_2 has statistics without parameters: renamed?"),
        "bn_2": ("wrong", "statistics without parameters, and bn2 has parameters without statistics: renamed?"),
    }
    whole = {f"net_{i}/{k}": v for i, k, v in ((1, "bn", lost), (2, "bn", alone))}
    assert set(found(tree(**whole))) == {"net_1/bn", "net_2/bn"}
    assert found(tree(a=norm(), proj=alone, ln=lost)) == {}  # a norm without parameters, and layer norm
    assert found(tree(a=alone, ln=lost)) == {}
    other = {name: value[:2] for name, value in alone.items()}
    assert "bn_2" not in found(tree(bn_0=norm(), bn2=lost, bn_2=other))  # of another size


def test_collections_wherever_they_lie():
    good = tree(bn=norm(), ln=norm(mean=None, var=None))
    for variables in (good, {"model": good}, {"gan": {"g": good, "d": good}}, {"state": good, "step": np.array(3)}):
        health = jn.inspect.report(variables)
        assert health.ok
        assert not health.notes
    assert [row["norm"] for row in jn.inspect.report({"gan": {"g": good, "d": good}})] == [
        "gan/d/bn", "gan/d/ln", "gan/g/bn", "gan/g/ln",
    ]  # fmt: skip
    assert jn.inspect.report(flat({"model": good})).ok  # as in .npz and .safetensors
    assert found({**good, "ema_params": tree(bn=norm())["params"]}) == {}  # a copy needs no statistics
    assert found({**good, "other": {"bn": {"scale": np.ones(N)}}})["other/bn"][0] == "wrong"


LOST = norm(mean=None, var=None)


def test_copies_without_statistics_are_no_faults():
    """Of whatever name: what holds all parameters of a model and no statistics."""
    net = {"a/bn": norm(), "b/bn": norm(bias=[0, 1, 2, 3]), "ln": LOST}
    good, init = tree(**net), optax.adam(1e-3).init
    params, stats, moments = good["params"], good["batch_stats"], init(good["params"])
    grads = jax.tree.map(lambda z: z * 1e-9, params)
    for variables in (
        {"model": good, "opt": moments}, (params, stats, moments), {**good, "best_params": params},
        {**good, "slow": params}, {**good, "grads": grads}, {"net": net, "mu": grads},
        {"g": good, "d": tree(bn=norm()), "opt_g": moments, "opt_d": init(tree(bn=norm())["params"])},
        flat({"model": good, "opt": {"mu": grads, "nu": grads}}),
    ):  # fmt: skip
        assert found(variables) == {}
    health = jn.inspect.report({**tree(bn=norm()), "best": tree(bn=LOST)["params"]})
    kinds = {row["norm"]: row["kind"] for row in health}
    assert kinds == {"bn": "batch", "best/bn": "copy"}
    broken = {"bn": {**LOST, "bias": LOST["bias"] * np.float32(np.nan)}}
    said = "4 of 4 entries of bias are NaN or infinite"
    assert found({**tree(bn=norm()), "best": broken}) == {"best/bn": ("wrong", said)}


def test_a_block_whose_statistics_are_lost_is_no_copy_of_another():
    blocks = {f"block_{i}/bn": norm() for i in (0, 2)} | {"block_1/bn": LOST}
    said = {"block_1/bn": ("wrong", "no statistics, though it is called bn")}
    assert found(tree(**blocks)) == said
    assert found(flat(blocks)) == said
    assert found({"net": blocks}).keys() == {"net/block_1/bn"}
    assert found(tree(**{"net_1/bn": LOST, "net_2/bn": norm()})).keys() == {"net_1/bn"}
    assert found({"a": tree(bn=norm()), "b": {"params": {"bn": LOST}}}).keys() == {"b/bn"}  # nor is a model of its own


def test_parameters_called_mean_or_var():
    for own in ({"mean": np.ones(N)}, {"var": np.ones(N)}, {"mean": np.zeros(N), "var": np.ones(N)}):
        good = tree(bn=norm())
        good["params"]["prior"] = own
        assert found(good) == {}
        assert len(jn.inspect.report(good)) == 1
        assert found({"model": good, "optimizer": {"mu": {"prior": own}}}) == {}
    assert found({"params": {"bn": norm(), "prior": {"mean": np.ones(N)}}})["prior"][0] == "wrong"  # all in one place


# --- replicas


def replicas(apart):
    return {"mean": np.stack([norm()["mean"] + i * apart for i in range(3)]), "var": np.stack([norm()["var"]] * 3)}


def test_replicas():
    """Means 0.1 apart: the first is 0.1 from their mean; the smallest standard deviation is sqrt(0.5)."""
    said = f"statistics of 3 replicas, up to {0.1 / np.sqrt(0.5):.2g} standard deviations apart: merge_replicas makes"
    said += " them one, unless these are layers or sets of one model"
    out = found(tree(bn=norm(**replicas(0.1)), other=norm(**replicas(0.1))))
    assert {name: grade for name, (grade, _) in out.items()} == {"bn": "wrong", "other": "wrong"}
    assert said in out["bn"][1]
    assert found(tree(bn=norm(**replicas(0.0))))["bn"] == ("note", "statistics of 3 replicas, all the same")
    params = {name: np.stack([norm()[name]] * 3) for name in ("scale", "bias")}  # pmap's, which replicates all
    assert found(tree(bn=params | replicas(0.1)))["bn"][0] == "wrong"
    own = {name: z * np.arange(1, 4, dtype=np.float32)[:, None] for name, z in params.items()}
    assert found(tree(bn=own | replicas(0.1))) == {}  # a norm of rows and channels
    assert found(tree(split_0=norm(**replicas(0.1)))) == {}  # sets, as of SplitBatchNorm
    assert jn.inspect.report(jn.tools.merge_replicas(tree(bn=params | replicas(0.1)))[0]).ok


# --- the report


def test_the_table():
    two, ten, ln = norm(var=[-1, 1, 1, 1]), norm(num_updates=np.array(5)), norm(mean=None, var=None)
    health = jn.inspect.report(tree(bn2=two, bn10=ten, ln=ln))
    assert health.title == "3 norms: 1 wrong, 0 with notes"
    assert [row["norm"] for row in health] == ["bn2", "bn10", "ln"]
    table = health.to_dict()
    assert table["grade"] == ["wrong", "", ""]
    assert table["updates"] == [None, 5, None]
    assert table["kind"] == ["batch", "batch", "scale and bias"]
    assert table["mean max"] == [3.0, 3.0, None]
    assert table["var min"] == [-1.0, 0.5, None]
    assert table["var max"] == [1.0, 9.0, None]
    assert table["scale min"] == pytest.approx([0.5, 0.5, 0.5])
    assert not health.ok
    assert "<td>1 of 4 variances are negative</td>" in health._repr_html_()
    assert str(health).splitlines()[3].startswith("bn2")


def test_where_shows_some_and_compares_all():
    variables = tree(bn_0=norm(), bn_1=norm(**FRESH), ln=norm(mean=None, var=None))
    health = jn.inspect.report(variables, where="bn_1")
    assert [row["norm"] for row in health] == ["bn_1"]
    assert "where bn_0 was" in health.rows[0]["finding"]
    assert len(jn.inspect.report(variables, where=lambda n: n.kind == "batch")) == 2
    with pytest.raises(ArgumentError, match=r"^jaxnorm.inspect.report: where='bm_1' matches no norm. Did you"):
        jn.inspect.report(variables, where="bm_1")


def test_it_reads_state_of_nnx_and_arrays_of_jax():
    model = nnx.Sequential(jx.BatchNorm(N, rngs=nnx.Rngs(0)), jx.LayerNorm(N, rngs=nnx.Rngs(0)))
    for variables in (nnx.state(model), model):
        assert [row["norm"] for row in jn.inspect.report(variables)] == ["layers/0", "layers/1"]
        assert found(variables)["layers/0"][0] == "note"
    model.layers[0].var[...] = jnp.array([1.0, -1.0, 1.0, 1.0])
    assert found(nnx.state(model))["layers/0"] == ("wrong", "1 of 4 variances are negative")
    assert len(jn.inspect.report({})) == 0


@pytest.mark.parametrize("case", family_modules.CASES, ids=lambda case: case.module)
def test_our_own_norms_are_sound(case):
    """Fresh: a note at most. After a step, beside another: nothing, but of FrozenBatchNorm, which was given nothing."""
    function, variables = family_modules.pure(case.build("linen"), family_modules.X, *case.inputs, **case.switch(True))
    name = f"{case.module}_0"
    fresh = {collection: {name: values} for collection, values in variables.items()}
    assert jn.inspect.report(fresh).ok
    if case.state:
        variables = function(variables, family_modules.X, *case.inputs, **case.switch(True))[1]
        other = tree(BatchNorm_9=norm())
        out = found({k: {name: variables[k], **other[k]} for k in other})
        assert out.keys() == ({name} if case.module == "FrozenBatchNorm" else set())


def test_what_it_refuses():
    for bad in ({"momentum": 1.5}, {"momentum": float("nan")}, {"epsilon": -1.0}, {"epsilon": float("inf")}):
        with pytest.raises(ArgumentError, match=r"^jaxnorm.inspect.report: (momentum|epsilon) is"):
            jn.inspect.report(tree(bn=norm()), **bad)
    with pytest.raises(ArgumentError, match=r"\['bn'\]\['mean'\] is traced, and this looks at numbers"):
        jax.jit(lambda v: jn.inspect.report(v).ok)({"bn": {"mean": jnp.zeros(2), "var": jnp.ones(2)}})
    for bad in (-1, 1.5, True, jnp.array(2.0), "3"):
        with pytest.raises(ArgumentError, match=r"^jaxnorm.inspect.report: updates is a whole number from 0, got"):
            jn.inspect.report(tree(bn=norm()), updates=bad)
    for bad in ("model.msgpack", None, [1, 2], nn.BatchNorm(False), {"bn": {"mean": [0.0], "var": [1.0]}}):
        with pytest.raises(ArgumentError, match=r"^jaxnorm.inspect.report: there is no array in it, .*tools.read"):
            jn.inspect.report(bad)
    assert len(jn.inspect.report({"kernel": np.ones((2, 2))})) == 0
    with pytest.raises(ArgumentError, match="is no array of numbers, it is a ShapeDtypeStruct"):
        jn.inspect.report(jax.eval_shape(lambda: {"bn": {"mean": jnp.zeros(2), "var": jnp.ones(2)}}))
