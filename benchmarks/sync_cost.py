"""What synchronizing batch norm costs on 2 to 4,096 devices, and what a group of devices loses in statistics.

    python benchmarks/sync_cost.py
    python benchmarks/sync_cost.py --link ethernet-100g --latency-us 20 --step-ms 200     your own link and step

Counted:   a synced batch norm is compiled on 8 simulated devices and its collectives are read from the compiled HLO.
Measured:  four ways to merge a variance over devices: digits in float32 against float64, collectives, time on CPU.
Modelled:  those collectives for ResNet-50's 53 batch norms, on links whose figures are stated with their sources.
Simulated: the noise of a batch's mean and variance by size of the group, beside its closed form.
"""

import argparse
import functools
import json
import math
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import jaxnorm as jn
from jaxnorm.__main__ import Parser
from jaxnorm.lab.options import BadOption, one_of, output_folder, positive, whole

COUNTED_ON, COUNTED_GROUP = 8, 4  # devices and group of the layer that is compiled: sizes that cannot be mixed up
SCALES = tuple(2**i for i in range(3, 13))  # 8 to 4,096 devices
GROUPS = tuple(2**i for i in range(9))  # 1 to 256 devices
MODES = ("all", "groups=", "second axis", "none")
WAYS = GATHER, RAW, SHIFTED, TWO = "gather (jaxnorm)", "one psum, raw", "one psum, shifted 1 % off", "two psums"
DATA = {"1e4, std 1": (1e4, 1.0), "1e4, std 1e2": (1e4, 1e2)}
ACCURATE = 1e-5  # relative error of the variance that a way must stay below at the first of them


class Collective(NamedTuple):
    """One operation: the rows of float32, one number a channel, that a device puts in, and how many devices do."""

    kind: str
    rows: float
    devices: int
    grows: bool = False  # whether the rows grow with the number of devices


def channels() -> list[int]:
    """The channels of ResNet-50's 53 batch norms: the stem, 16 bottlenecks of three, 4 downsamplings."""
    widths = [64]
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        widths += [width, width, 4 * width] * blocks + [4 * width]
    return widths


def collectives(text: str, width: int) -> list[Collective]:
    """The collectives of a compiled program on arrays of `width` channels, from the shapes of operands and results."""

    def num_bytes(shapes):  # of an array, or of a tuple of arrays
        arrays = re.findall(r"[a-z](\d+)\[([\d,]*)\]", shapes)
        return sum(int(bits) // 8 * math.prod(int(n) for n in dims.split(",") if n) for bits, dims in arrays)

    shapes = dict(re.findall(r"%([\w.-]+) = (\(.*?\)|\S+) [\w-]+\(", text))
    operation = r"= (\(.*?\)|\S+) (all-\w+|reduce-scatter|collective-\w+)[\w-]*\((.*?)\).*?replica_groups=(.*?), \w+="
    found = []
    for result, kind, operands, groups in re.findall(operation, text):
        inside = sum(num_bytes(shapes[name]) for name in re.findall(r"%([\w.-]+)", operands))
        found.append(Collective(kind, min(inside, num_bytes(result)) / (4 * width), group_size(groups)))
    return found


def group_size(groups: str) -> int:
    """Devices in one of HLO's replica groups, in its three spellings: {{0,1},{2,3}}, [2,2]<=[4], mesh['a'=4] {'a'}."""
    if groups.startswith("mesh"):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", groups))
        return math.prod(int(sizes[name]) for name in re.findall(r"'(\w+)'", groups.split("{")[1]))
    return int(groups[1:].split(",")[1].split("]")[0]) if groups[0] == "[" else groups.split("}")[0].count(",") + 1


def layer(mode: str, devices: int = COUNTED_ON, width: int = 24) -> dict[str, list[Collective]]:
    """The collectives of one batch norm in training, forward and backward, by the way it is synchronized."""
    axes = {"outer": devices // COUNTED_GROUP, "inner": COUNTED_GROUP} if mode == MODES[2] else {"devices": devices}
    over = {"none": "n", "second axis": "n inner"}.get(mode, "n devices")
    groups = {"devices": np.arange(devices).reshape(2, -1).tolist()} if mode == "groups=" else None

    def forward(x):
        y, running = jn.batch_norm(x, jn.running_stats(c=width), "n c", over, groups=groups)
        return jnp.sin(y), (running.mean, running.var)

    both = jax.grad(lambda x: (forward(x)[0].sum(), forward(x)[1]), has_aux=True)
    mesh = jax.make_mesh(tuple(axes.values()), tuple(axes), axis_types=(AxisType.Auto,) * len(axes))
    x, spec = jnp.ones((4 * devices, width)), PartitionSpec(tuple(axes))
    mapped = (jax.shard_map(f, mesh=mesh, in_specs=spec, out_specs=spec) for f in (forward, both))
    first, last = (collectives(jax.jit(f).lower(x).compile().as_text(), width) for f in mapped)
    for op in first:
        last.remove(op)
    half = {"forward": first, "backward": last} if devices < COUNTED_ON else layer(mode, devices // 2, width)
    ops = zip((*first, *last), (*half["forward"], *half["backward"]), strict=True)
    ops = [op._replace(grows=op.rows > smaller.rows) for op, smaller in ops]
    return {"forward": ops[: len(first)], "backward": ops[len(first) :]}


def merged(way: str, x: jax.Array, shift: jax.Array) -> jax.Array:
    """The variance of each channel over the rows of all devices, in one of the WAYS."""
    if way == GATHER:
        return jn.moments(x, "n c", "n devices").var
    n = jnp.full_like(shift, len(x))  # the count crosses too: shards may be uneven
    if way == TWO:
        n, first = jax.lax.psum(jnp.stack([n, x.sum(0)]), "devices")
        return jax.lax.psum(((x - (first / n)[None]) ** 2).sum(0), "devices") / n
    x = x - shift[None] if way == SHIFTED else x
    n, first, second = jax.lax.psum(jnp.stack([n, x.sum(0), (x * x).sum(0)]), "devices")
    return second / n - (first / n) ** 2


def measure(devices: int, width: int = 64, per_device: int = 256, runs: int = 30) -> dict[str, dict]:
    """Error, collectives and time of every way, on the devices of this process."""
    mesh = jax.make_mesh((devices,), ("devices",), axis_types=(AxisType.Auto,))
    specs = (PartitionSpec("devices"), PartitionSpec())
    mapped = functools.partial(jax.shard_map, mesh=mesh, in_specs=specs, out_specs=specs[0])
    functions = {way: jax.jit(mapped(functools.partial(merged, way))) for way in WAYS}
    found = {way: {"errors": {}} for way in WAYS}
    for name, (mean, std) in DATA.items():
        x = np.random.default_rng(0).normal(mean, std, (devices * per_device, width)).astype(np.float32)
        true, shift = x.astype(np.float64).var(0), jnp.full(width, 1.01 * mean, jnp.float32)
        x = jax.device_put(x, NamedSharding(mesh, specs[0]))
        for way, f in functions.items():
            found[way]["errors"][name] = float(np.abs(np.asarray(f(x, shift), np.float64)[:width] / true - 1).max())
    best = dict.fromkeys(WAYS, math.inf)
    for _ in range(runs):  # interleaved: the load of the machine falls on all alike
        for way, f in functions.items():
            start = time.perf_counter()
            jax.block_until_ready(f(x, shift))
            best[way] = min(best[way], time.perf_counter() - start)
    for way, f in functions.items():
        found[way]["time_ratio_cpu_simulated"] = best[way] / best[RAW]
        found[way]["collectives"] = collectives(f.lower(x, shift).compile().as_text(), width)
    return found


class Link(NamedTuple):
    """What joins the devices. Algorithms: (steps, us to launch, us a hop). GB/s: what a ring through all carries."""

    gather: tuple[str, float, float]  # all-gather and reduce-scatter
    reduce: tuple[str, float, float]  # all-reduce: there to reduce, and back to spread
    gbs: float
    source: str
    node: int = 1  # devices that share a faster link
    node_hop_us: float = 0.0
    node_gbs: float = 0.0


# NCCL gathers along a ring and reduces along a tree: NVIDIA/nccl src/graph/tuning.cc. Its figures for small messages
# are 6.6 and 6.8 us to launch, 2.7 and 5 us a hop over the network, 0.6 us over NVLink (also in pytorch/pytorch
# torch/_inductor/comm_analysis.py). Its newer PAT (arXiv 2506.20252) gathers small arrays along trees: --gather tree.
# A TPU's ICI: 1 us a hop, and 8 us for a gather of 3 (jax-ml/scaling-book sharding.md).
RING, TREE, TORUS = ("ring", 6.6, 2.7), ("tree", 6.8, 5.0), ("torus", 5.0, 1.0)
# DGX: 8 GPUs a node, NVLink of 18 x 25 GB/s each way, a 400 Gb/s card a GPU: 8 rings share the 400 GB/s of a node.
LINKS = {
    "dgx-h100": Link(RING, TREE, 400, "jax-ml/scaling-book gpus.md", node=8, node_hop_us=0.6, node_gbs=450),
    "tpu-v5p": Link(TORUS, TORUS, 600, "1,200 GB/s a chip both ways, 3D torus: cloud.google.com/tpu/docs/v5p"),
    "ethernet-100g": Link(RING, TREE, 12.5, "the line rate of 100 Gb/s, one device a machine"),
}


def cost(link: Link, kind: str, payload: float, devices: int) -> tuple[float, float]:
    """Bytes that a device sends (and receives), and microseconds, of a collective on `payload` bytes a device.

    all-gather, reduce-scatter: (D - 1) / D * (D * payload);   all-reduce: 2 (D - 1) / D * payload. A ring hops from
    device to device, a tree from node to node with a chain inside each, as NCCL counts, a torus half-way round 3 axes.
    """
    gather, reduce = (1, link.gather, devices * payload), (2, link.reduce, payload)
    passes, (steps, launch, hop), total = {"all-gather": gather, "reduce-scatter": gather, "all-reduce": reduce}[kind]
    nodes = math.ceil(devices / link.node)
    hops_us = {
        "ring": (nodes - 1) * hop + (devices - nodes) * link.node_hop_us,
        "tree": math.ceil(math.log2(nodes)) * hop + (min(devices, link.node) - 1) * link.node_hop_us,
        "torus": 1.5 * devices ** (1 / 3) * hop,
    }[steps]
    moved = passes * (devices - 1) / devices * total
    gbs = link.node_gbs if 1 < devices <= link.node else link.gbs
    return moved, (launch + passes * hops_us + moved / (1e3 * gbs)) * (devices > 1)


def step_cost(link: Link, ops: list[Collective], devices: int, group: int) -> list[float]:
    """Bytes and ms of ResNet-50's step. They add up, for nothing overlaps: the next layer waits for the statistics."""
    costs = []
    for op in ops:
        size = devices if op.devices == COUNTED_ON else min(group, devices)
        payload = 4 * op.rows * (size / COUNTED_ON if op.grows else 1)
        costs += [cost(link, op.kind, payload * width, size) for width in channels()]
    return [sum(moved for moved, _ in costs), sum(us for _, us in costs) / 1e3]


def noise(pictures: int, positions: int, correlation: float) -> tuple[float, float]:
    """Standard deviation of the mean, over sigma, and of the variance, over its own mean. Closed form.

    Model: x = sqrt(r) a + sqrt(1 - r) e, a normal number a for each picture and e for each position, so that any two
    positions of a picture have correlation r. With N pictures of P positions the covariance of a picture has the
    eigenvalues L = 1 + (P - 1) r, once, and l = 1 - r, P - 1 times; var(mean) = L / (N P), and N P times the variance
    is L chi2(N - 1) + l chi2(N (P - 1)). P = 1 gives the textbook's 1 / sqrt(N) and sqrt(2 / (N - 1)).
    """
    large, small = 1 + (positions - 1) * correlation, 1 - correlation
    once, often = pictures - 1, pictures * (positions - 1)
    spread = math.sqrt(2 * (large**2 * once + small**2 * often)) / (large * once + small * often)
    return math.sqrt(large / (pictures * positions)), spread


def simulate(batch: int, positions: int, correlation: float, trials: int = 400) -> dict[int, dict]:
    """The same two numbers by size of the group, from `trials` draws of 256 devices with `batch` pictures, and both."""
    rng, most = np.random.default_rng(0), GROUPS[-1]
    means, m2s = np.empty((2, trials, most))
    for i in range(trials):
        x = math.sqrt(1 - correlation) * rng.standard_normal((most, batch, positions))
        x += math.sqrt(correlation) * rng.standard_normal((most, batch, 1))
        means[i] = x.mean((1, 2))
        m2s[i] = ((x - means[i][:, None, None]) ** 2).sum((1, 2))
    found = {}
    for group in GROUPS:  # merged as devices are: m2 = sum(m2) + count * sum((mean - mean of the group)^2)
        mean = means.reshape(-1, group)
        var = m2s.reshape(-1, group).mean(1) / (batch * positions) + mean.var(1)
        found[group] = {"simulated": (float(mean.mean(1).std()), float(var.std() / var.mean()))}
        found[group]["closed"] = noise(batch * group, positions, correlation)
    return found


def conclusions(report: dict, args: argparse.Namespace) -> list[str]:
    """What the numbers say, in sentences made from them."""

    def since(test):
        first = next((d for d in ms if all(test(ms[later]) for later in ms if later >= d)), None)
        return f"from {first:,} devices on" if first else f"at no size up to {last:,}"

    measured, last = report["measured"], SCALES[-1]
    worst = {way: max(of[way]["errors"]["1e4, std 1"] for of in measured.values()) for way in WAYS}
    told = "; ".join(f"{way} {worst[way]:.0e} in {len(measured[2][way]['collectives'])}" for way in WAYS)
    good = " and ".join(way for way in WAYS if worst[way] < ACCURATE)
    said = [f"Worst variance error, mean 1e4, std 1, and collectives: {told}. Below {ACCURATE:.0e}: {good}."]
    for name, of in report["modelled"].items():
        ms = {d: {way: value for way, (_, value) in ways.items()} for d, ways in of.items()}
        slower, group = since(lambda of: of[GATHER] > of[TWO]), ms[last]["second axis"]
        too_much = since(lambda of: of["all"] > args.percent / 100 * args.step_ms)
        said.append(
            f"{name}: forward, two psums are faster than the one gather {slower} ({ms[64][TWO]:.3g} and "
            f"{ms[64][GATHER]:.3g} ms a step on 64, {ms[last][TWO]:.3g} and {ms[last][GATHER]:.3g} on {last:,}). Sync "
            f"over all takes over {args.percent:g} % of a {args.step_ms:g} ms step {too_much}: {ms[8]['all']:.3g} ms "
            f"on 8, {ms[last]['all']:.3g} on {last:,}. Over a second axis of {args.group} it takes {group:.3g} ms."
        )
    mb = {mode: of[last][mode][0] / 1e6 for mode in MODES}  # the same on every link
    n, rs = math.ceil(args.pictures / args.group) * args.group, (args.correlation, 0, 1)
    mean, var, _, none, _, full = (100 * part for r in rs for part in noise(n, args.positions, r))
    return [
        *said,
        f"On {last:,} devices each sends {mb['all']:,.0f} MB a step over all, {mb['groups=']:,.0f} MB with groups= "
        f"({mb['groups='] / mb['all']:.2g} times as much), {mb['second axis']:,.1f} MB over a second axis.",
        f"A group of {args.group} is enough from {n // args.group} pictures a device on, {n} in all. Noise: {mean:.2g} "
        f"% of sigma in the mean, {var:.2g} % in the variance at correlation {args.correlation:g} ({none:.2g} % at 0, "
        f"{full:.2g} % at 1). All D devices divide it by sqrt(D / {args.group}).",
    ]


def show(title: str, head: list[str], rows: list[list[str]]) -> None:
    """A table, with rich where it is installed."""
    try:
        from rich import console, table
    except ImportError:
        print("\n".join(["", title, *(" | ".join(row) for row in (head, *rows))]))
        return
    grid = table.Table(*head, title=title, title_justify="left")
    for row in rows:
        grid.add_row(*row)
    console.Console(width=None if sys.stdout.isatty() else 120).print(grid)


def tables(report: dict) -> None:
    def told(ops):
        return " + ".join(f"{op.kind} {op.rows / 8**op.grows:g}{' a device' * op.grows}" for op in ops) or "-"

    measured, links, layers = report["measured"], report["modelled"], len(channels())
    rows = [[mode, told(of["forward"]), told(of["backward"])] for mode, of in report["counted"].items()]
    rows += [[way, told([Collective(*op) for op in of["collectives"]]), ""] for way, of in measured[2].items()]
    show("Counted in HLO, one layer: collectives and their rows of float32", ["sync", "forward", "backward"], rows)
    head = ["way", *(f"{n} devices" for n in measured)]
    for name in DATA:
        rows = [[way, *(f"{of[way]['errors'][name]:.0e}" for of in measured.values())] for way in WAYS]
        show(f"Measured: relative error of the variance, float32, mean {name}", head, rows)
    rows = [[way, *(f"{of[way]['time_ratio_cpu_simulated']:.2f}" for of in measured.values())] for way in WAYS]
    show("Measured: time over that of one raw psum. CPU-simulated: says nothing of a real link", head, rows)
    sent = {d: [of[mode][0] / 1e3 for mode in MODES] for d, of in next(iter(links.values())).items()}
    rows = [[f"{d:,}", *(f"{kb / 1e3:,.1f} MB, {kb / layers:,.0f} kB" for kb in sent[d])] for d in SCALES]
    show("ResNet-50: what a device sends, in a step and in the mean layer", ["devices", *MODES], rows)
    for title, unit in (("ms a step", 1), ("us in the mean layer", 1e3 / layers)):
        ms = {d: [[unit * of[d][mode][1] for mode in MODES[:3]] for of in links.values()] for d in SCALES}
        rows = [[f"{d:,}", *(" / ".join(f"{v:,.1f}" for v in cell) for cell in ms[d])] for d in SCALES]
        show(f"ResNet-50, modelled: {title}: all / groups= / second axis", ["devices", *links], rows)
    percent = {g: [100 * np.array([*of[g].values()]).T for of in report["noise"].values()] for g in GROUPS}
    rows = [[str(g), *(" / ".join(f"{a:.2g} ({b:.2g})" for a, b in of) for of in percent[g])] for g in GROUPS]
    head = ["group", *(f"{batch} pictures a device" for batch in report["noise"])]
    show("Simulated (closed form): noise in %, of the mean over sigma / of the variance", head, rows)


def draw(report: dict, path: Path, args: argparse.Namespace) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(16, 5), layout="constrained")
    sent, spent, spread = panels = figure.subplots(1, 3)
    links, styles = report["modelled"], (("#0072B2", "o"), ("#D55E00", "s"), ("#009E73", "^"))

    def line(axes, x, y, i, label=None, style="-"):
        axes.plot(x, y, linestyle=style, color=styles[i][0], marker=styles[i][1] if label else None, label=label)

    for i, mode in enumerate(MODES[:3]):
        line(sent, SCALES, [next(iter(links.values()))[d][mode][0] / 1e6 for d in SCALES], i, mode)
    for i, (name, of) in enumerate(links.items()):
        line(spent, SCALES, [of[d]["all"][1] for d in SCALES], i, f"{name}, all")
        line(spent, SCALES, [of[d]["second axis"][1] for d in SCALES], i, f"{name}, second axis of {args.group}", ":")
    spent.axhline(args.percent / 100 * args.step_ms, color="0.4", label=f"{args.percent:g} % of a step")
    for i, (batch, of) in enumerate(report["noise"].items()):
        line(spread, GROUPS, [100 * of[g]["closed"][1] for g in GROUPS], i)
        line(spread, GROUPS, [100 * of[g]["simulated"][1] for g in GROUPS], i, f"{batch} pictures a device", "")
    sent.set(title=f"bytes of sync, ResNet-50; groups of {args.group}", ylabel="sent by a device in a step (MB)")
    spent.set(title="time of sync, ResNet-50, modelled", ylabel="in a step (ms)")
    spread.set(title="noise of the variance; lines: closed form", ylabel="standard deviation (% of the variance)")
    for axes in panels:
        axes.set(yscale="log", xlabel="devices in the group" if axes is spread else "devices")
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter("{x:,.0f}")
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)

    def add(flag, kind, default, text):
        parser.add_argument(flag, type=kind, default=default, help=text + f" (default: {default})" * bool(default))

    add("--link", one_of(tuple(LINKS)), None, f"only this one of {', '.join(LINKS)}; left out, all of them")
    add("--latency-us", positive, None, "a hop between nodes, instead of the link's")
    add("--bandwidth-gbs", positive, None, "GB/s of a ring through all devices, likewise")
    add("--gather", one_of(("ring", "tree", "torus")), None, "how all-gathers travel, likewise: ring, tree or torus")
    add("--step-ms", positive, 50, "a step without sync; 50 is 128 pictures at 2,600 a second (an A100)")
    add("--percent", positive, 5, "of a step that is too much for sync")
    add("--group", whole, 16, "devices that share statistics where not all do")
    add("--pictures", whole, 32, "enough for a statistic; Goyal et al. 2017 had 32 on every device")
    add("--positions", whole, 49, "a picture has in a channel; 7 x 7 in ResNet-50's last stage")
    add("--correlation", positive, 0.3, "of two positions of a picture, up to 1: an assumption")
    add("--devices", whole, 64, "simulated to measure on: 2, 4, 8 and so on to this")
    add("--out", Path, Path("benchmarks/results"), "folder for sync_cost.json and .png; files there are replaced")
    parser.add_argument("--worker", type=whole, help=argparse.SUPPRESS)
    args = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", args.worker or COUNTED_ON)
    if args.worker:  # the number of devices is fixed once JAX has started: a process for each
        print(json.dumps(measure(args.worker)))
        return
    if not 2 <= args.devices <= 64 or args.correlation > 1 or args.pictures < 2:
        parser.error("--devices must be from 2 to 64, --correlation at most 1, --pictures at least 2")
    try:
        folder = output_folder(args.out, "")
    except BadOption as error:
        parser.error(str(error))
    links = {name: LINKS[name] for name in ([args.link] if args.link else LINKS)}
    for name, (gather, reduce, gbs, *_) in links.items():
        (steps, launch_us, hop_us), hop = gather, args.latency_us
        gather, reduce = (args.gather or steps, launch_us, hop or hop_us), (*reduce[:2], hop or reduce[2])
        links[name] = LINKS[name]._replace(gather=gather, reduce=reduce, gbs=args.bandwidth_gbs or gbs)
    counted, measured = {mode: layer(mode) for mode in MODES}, {}
    for n in (2**i for i in range(1, args.devices.bit_length())):
        command = [sys.executable, __file__, "--worker", str(n)]
        measured[n] = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    ops = {mode: of["forward"] + of["backward"] for mode, of in counted.items()}
    ops |= {way: [Collective(*op[:2], COUNTED_ON) for op in of["collectives"]] for way, of in measured[n].items()}
    report = {
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{os.cpu_count()} CPU cores; the devices are simulated on them",
        "versions": {module.__name__: module.__version__ for module in (jax, np, jn)},
        "options": {name: value for name, value in vars(args).items() if name not in ("out", "worker")},
        "counted": counted,
        "measured": measured,
        "links": {name: link._asdict() for name, link in links.items()},
        "modelled": {  # by link, devices, way of syncing: bytes and ms of ResNet-50's step
            name: {d: {way: step_cost(link, of, d, args.group) for way, of in ops.items()} for d in (2, 4, *SCALES)}
            for name, link in links.items()
        },
        "noise": {n: simulate(n, args.positions, args.correlation) for n in (2, 8, 32)},
    }
    report["conclusions"] = conclusions(report, args)
    tables(report)
    print("", *report["conclusions"], sep="\n- ")
    (folder / "sync_cost.json").write_text(json.dumps(report, indent=1) + "\n")
    draw(report, folder / "sync_cost.png", args)


if __name__ == "__main__":
    main()
