"""benchmarks/sync_cost.py: what it counts in HLO, its cost model by hand, and its simulation by the closed form."""

import importlib.util
import math
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "sync_cost.py"
spec = importlib.util.spec_from_file_location("sync_cost", SCRIPT)
sync_cost = importlib.util.module_from_spec(spec)
spec.loader.exec_module(sync_cost)

LINK = sync_cost.Link(("ring", 10.0, 2.0), ("tree", 20.0, 3.0), 50, "made up", node=4, node_hop_us=1.0, node_gbs=100)


def test_resnet_50_has_53_batch_norms():
    channels = sync_cost.channels()
    assert (len(channels), sum(channels), min(channels), max(channels)) == (53, 26560, 64, 2048)


def test_collectives_of_a_known_program_are_counted():
    mesh = jax.make_mesh((2, 4), ("a", "b"), axis_types=(AxisType.Auto,) * 2)

    def f(x):  # (1, 6) on each device: 6 channels
        gathered = jax.lax.all_gather(jnp.stack([x, 2 * x, 3 * x]), "b")
        summed = jax.lax.psum(jnp.sin(x), ("a", "b"))
        scattered = jax.lax.psum_scatter(jnp.cos(x * jnp.arange(1.0, 5.0)[:, None]), "b")
        return gathered.sum((0, 1)) * summed + scattered[None]

    mapped = jax.shard_map(f, mesh=mesh, in_specs=P(("a", "b")), out_specs=P(("a", "b")))
    found = sync_cost.collectives(jax.jit(mapped).lower(jnp.ones((8, 6))).compile().as_text(), 6)
    assert sorted(op[:3] for op in found) == [("all-gather", 3, 4), ("all-reduce", 1, 8), ("reduce-scatter", 1, 4)]


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("{{0,1,2,3,4,5,6,7}}", 8),
        ("{{0,1},{2,3},{4,5},{6,7}}", 2),
        ("[2,4]<=[8]", 4),
        ("[4,2]<=[2,4]T(1,0)", 2),
        ("mesh['outer'=2,'inner'=4] {'inner'}", 4),
        ("mesh['outer'=2,'inner'=4] {'outer', 'inner'}", 8),
    ],
)
def test_size_of_replica_groups(text, size):
    assert sync_cost.group_size(text) == size


def test_a_layer_syncs_with_one_collective_each_way():
    """Not for groups=, whose way of moving its moments is free to change: the script counts whatever it is."""
    counted = {mode: sync_cost.layer(mode) for mode in ("all", "second axis", "none")}
    devices = {mode: [op.devices for way in of.values() for op in way] for mode, of in counted.items()}
    assert devices == {"all": [8, 8], "second axis": [4, 4], "none": []}
    assert [op[:2] for op in counted["all"]["forward"]] == [op[:2] for op in counted["second axis"]["forward"]]
    assert not any(op.grows for of in counted.values() for way in of.values() for op in way)


def test_cost_by_hand():
    # 1,000 bytes on 4 devices of a node: 3/4 of 4,000 bytes, 3 hops of 1 us, 100 GB/s
    assert sync_cost.cost(LINK, "all-gather", 1e3, 4) == pytest.approx((3000, 10 + 3 * 1 + 3000 / 100e3))
    # 16 devices in 4 nodes. Ring: 3 hops between nodes and 12 inside, 50 GB/s
    assert sync_cost.cost(LINK, "all-gather", 1e3, 16) == pytest.approx((15000, 10 + 3 * 2 + 12 * 1 + 15000 / 50e3))
    assert sync_cost.cost(LINK, "reduce-scatter", 1e3, 16) == sync_cost.cost(LINK, "all-gather", 1e3, 16)
    # tree, there and back: log2(4) hops between nodes and a chain of 3 inside; 2 * 15/16 of the payload
    assert sync_cost.cost(LINK, "all-reduce", 1e3, 16) == pytest.approx((1875, 20 + 2 * (2 * 3 + 3) + 1875 / 50e3))
    # torus of 4 x 4 x 4: half-way round three axes is 6 hops
    torus = LINK._replace(gather=("torus", 5.0, 1.0), node=1)
    assert sync_cost.cost(torus, "all-gather", 1e3, 64) == pytest.approx((63000, 5 + 6 + 63000 / 50e3))
    assert sync_cost.cost(LINK, "all-gather", 1e3, 1) == (0, 0)
    with pytest.raises(KeyError):
        sync_cost.cost(LINK, "all-to-all", 1e3, 4)


def test_a_step_adds_up_the_layers_and_a_group_stays_one():
    whole, grouped = sync_cost.Collective("all-gather", 4, 8), sync_cost.Collective("all-gather", 4, 4)
    payload = 4 * 4 * 26560  # rows of float32
    assert sync_cost.step_cost(LINK, [whole], 64, 16)[0] == pytest.approx(63 * payload)
    assert sync_cost.step_cost(LINK, [grouped], 64, 16)[0] == pytest.approx(15 * payload)
    us = 53 * (10 + 15 * 2 + 48 * 1) + 63 * payload / 50e3
    assert sync_cost.step_cost(LINK, [whole], 64, 16)[1] == pytest.approx(us / 1e3)
    assert sync_cost.step_cost(LINK, [], 64, 16) == [0, 0]
    growing = sync_cost.Collective("all-reduce", 16, 8, grows=True)  # 2 rows for each device: 128 on 64
    assert sync_cost.step_cost(LINK, [growing], 64, 16)[0] == pytest.approx(2 * 63 / 64 * 4 * 128 * 26560)


def test_closed_form_of_independent_and_of_equal_positions():
    assert sync_cost.noise(50, 1, 0.3) == pytest.approx((1 / math.sqrt(50), math.sqrt(2 / 49)))
    assert sync_cost.noise(50, 4, 0) == pytest.approx((1 / math.sqrt(200), math.sqrt(2 / 199)))
    assert sync_cost.noise(50, 4, 1) == pytest.approx((1 / math.sqrt(50), math.sqrt(2 / 49)))  # they say nothing new


@pytest.mark.parametrize(("batch", "positions", "correlation"), [(2, 1, 0.5), (8, 9, 0.3), (32, 4, 0.9)])
def test_simulation_matches_the_closed_form(batch, positions, correlation):
    trials = 100
    for group, of in sync_cost.simulate(batch, positions, correlation, trials).items():
        # K independent estimates: their standard deviation is known to sqrt((kurtosis - 1) / (4 K)), the kurtosis of
        # the mean being 3 and that of the variance at most that of chi2(N - 1); four of those is the tolerance
        k, kurtosis = trials * 256 / group, 3 + 12 / (batch * group - 1)
        assert of["simulated"][0] == pytest.approx(of["closed"][0], rel=4 * math.sqrt(2 / (4 * k)))
        assert of["simulated"][1] == pytest.approx(of["closed"][1], rel=4 * math.sqrt((kurtosis - 1) / (4 * k)))


def test_only_centred_merges_keep_their_digits():
    found = sync_cost.measure(8, width=4, per_device=64, runs=1)
    good = {way for way, of in found.items() if of["errors"]["1e4, std 1"] < sync_cost.ACCURATE}
    assert good == {sync_cost.GATHER, sync_cost.TWO}
    assert [len(found[way]["collectives"]) for way in sync_cost.WAYS] == [1, 1, 1, 2]


@pytest.mark.parametrize(
    "options", [["--link", "dgx-h10"], ["--correlation", "2"], ["--devices", "1"], ["--group", "0"], ["--gather", "x"]]
)
def test_a_bad_value_is_one_line_and_exit_2(options, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["sync_cost.py", *options])
    monkeypatch.setattr(jax.config, "update", lambda *args: None)
    with pytest.raises(SystemExit) as stopped:
        sync_cost.main()
    assert stopped.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1
