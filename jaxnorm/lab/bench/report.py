"""What is left of a benchmark: the numbers as JSON, and the tables in the terminal."""

import dataclasses
import datetime
import importlib.metadata
import platform
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax

import jaxnorm
from jaxnorm.lab.bench import peers, timing
from jaxnorm.lab.bench.options import Options

Rows = list[dict[str, Any]]
REFERENCE = "flax.linen"
TITLES = {"forward": "forward", "backward": "forward and backward"}


@dataclasses.dataclass
class Kept:
    """What there is while the benchmark goes on."""

    facts: dict[str, Any]
    measurements: Rows = dataclasses.field(default_factory=list)
    tiny: Rows = dataclasses.field(default_factory=list)
    compile: Rows = dataclasses.field(default_factory=list)


def facts(options: Options, mb: float, found: Iterable[str], left_out: dict[str, str], allocator: bool) -> dict:
    """What is known beforehand: when, where, with what."""
    device = jax.devices()[0]
    distributions = ("jax", "jaxlib", "flax", "numpy", *(peers.PACKAGES.get(name, name) for name in found))
    versions = {name: importlib.metadata.version(name) for name in distributions if "." not in name}
    asked = dataclasses.asdict(options) | {"mb": mb}
    return {
        "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "machine": {
            "cpu": cpu_model(),
            "cores": peers.cores(),
            "platform": device.platform,
            "chip": device.device_kind,
            "system": platform.platform(),
            "allocator_keeps_memory": allocator,
        },
        "versions": {"jaxnorm": jaxnorm.__version__, "python": platform.python_version()} | versions,
        "options": {name: str(value) if isinstance(value, Path) else value for name, value in asked.items()},
        "left_out": left_out,
    }


def cpu_model() -> str:
    """The name a person would know it by, where the system tells."""
    try:
        names = re.findall(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()


def base_name(facts: dict[str, Any]) -> str:
    """<date>-cpu, or <date>-<chip>: of the files written."""
    machine = facts["machine"]
    chip = "cpu" if machine["platform"] == "cpu" else machine["chip"]
    return f"{facts['date'][:10]}-{re.sub('[^a-z0-9]+', '-', chip.lower()).strip('-')}"


def groups(rows: Rows, *keys: str) -> dict[tuple, Rows]:
    """The rows that agree in `keys`, in the order in which they came."""
    found: dict[tuple, Rows] = {}
    for row in rows:
        found.setdefault(tuple(row[key] for key in keys), []).append(row)
    return found


def limits(measurements: Rows) -> Rows:
    """Times the limit, geometric mean over the shapes, of each norm, dtype, peer and way."""
    keys = ("norm", "dtype", "peer", "way")
    timed = [row for row in measurements if row["peer"] != "copy"]
    return [
        dict(zip(keys, group, strict=True)) | {"times_limit": timing.geometric_mean(row["times_limit"] for row in rows)}
        for group, rows in groups(timed, *keys).items()
    ]


def speedups(measurements: Rows) -> Rows:
    """The time of flax.linen by ours for each norm, dtype and way: geometric mean over the shapes, and the worst."""
    found = []
    for (norm, dtype, way), rows in groups(measurements, "norm", "dtype", "way").items():
        by_peer = {(row["peer"], tuple(row["shape"])): row["min_ms"] for row in rows}
        theirs = {shape: ms for (peer, shape), ms in by_peer.items() if peer == REFERENCE}
        ratios = {shape: ms / by_peer["jaxnorm", shape] for shape, ms in theirs.items()}
        if ratios:
            worst = min(ratios, key=lambda shape: ratios[shape])
            mean = timing.geometric_mean(ratios.values())
            row = {"norm": norm, "dtype": dtype, "way": way, "mean": mean}
            found.append(row | {"worst": ratios[worst], "worst_shape": worst})
    return found


def tiny_speedups(tiny: Rows) -> Rows:
    """The time of flax.linen by ours for tiny inputs: of the medians, as threads that happen to spin halve a call."""
    found = []
    for (norm, dtype, mode, way), rows in groups(tiny, "norm", "dtype", "mode", "way").items():
        of = {row["peer"]: row["median_us"] for row in rows}
        found.append({"norm": norm, "dtype": dtype, "mode": mode, "way": way, "ratio": of[REFERENCE] / of["jaxnorm"]})
    return found


def compile_ratios(rows: Rows) -> dict[str, float]:
    """Our time by that of flax.linen: 1.1 is 10 % more."""
    of = {row["peer"]: row for row in rows}
    both = {part: [of[peer][f"{part}_min_s"] for peer in ("jaxnorm", REFERENCE)] for part in ("trace", "compile")}
    both["together"] = [trace + compiled for trace, compiled in zip(both["trace"], both["compile"], strict=True)]
    return {part: ours / theirs for part, (ours, theirs) in both.items()}


def bandwidths(measurements: Rows) -> Rows:
    """Of the copy, in GB/s read and written together, by the size of what is copied: the best seen."""
    of = groups([row for row in measurements if row["peer"] == "copy"], "dtype", "mb")
    return [
        {"dtype": dtype, "mb": mb, "gb_per_s": max(row["gb_per_s"] for row in rows)} for (dtype, mb), rows in of.items()
    ]


def document(kept: Kept, interrupted: bool) -> dict[str, Any]:
    """All that the JSON file says. "backward" is forward and backward together."""
    results = {"interrupted": interrupted} | kept.facts
    results |= {"copy_bandwidth": bandwidths(kept.measurements), "measurements": kept.measurements}
    results |= {"times_limit": limits(kept.measurements), "flax_linen_by_ours": speedups(kept.measurements)}
    results |= {"tiny": kept.tiny, "tiny_flax_linen_by_ours": tiny_speedups(kept.tiny)}
    return results | {"compile": kept.compile, "compile_ratios": compile_ratios(kept.compile) if kept.compile else {}}


def tables(results: dict[str, Any]) -> list[Any]:
    """As rich tables, those for which there is something."""
    made = []
    for way in timing.WAYS:
        rows = [row for row in results["times_limit"] if row["way"] == way]
        if rows:
            made.append(limit_table(rows, way))
    if results["flax_linen_by_ours"]:
        made.append(speedup_table(results["flax_linen_by_ours"]))
    if results["tiny"]:
        made.append(tiny_table(results["tiny_flax_linen_by_ours"]))
    if results["compile"]:
        made.append(compile_table(results["compile"], results["compile_ratios"]))
    return made


def grid(caption: str, first: list[str], numbers: list[str]) -> Any:
    from rich.table import Table

    made = Table(caption=caption)
    for header in first:
        made.add_column(header)
    for header in numbers:
        made.add_column(header, justify="right")
    return made


def limit_table(rows: Rows, way: str) -> Any:
    names = list(dict.fromkeys(row["peer"] for row in rows))
    caption = f"{TITLES[way]}, times the limit: geometric mean over the shapes"
    made = grid(caption, ["norm", "dtype"], [name.replace(".", "\n") for name in names])
    made.pad_edge = False  # seven frameworks in 80 columns
    for (norm, dtype), group in groups(rows, "norm", "dtype").items():
        of = {row["peer"]: f"{row['times_limit']:.1f}" for row in group}
        made.add_row(norm, dtype, *(of.get(name, "-") for name in names))
    return made


def speedup_table(rows: Rows) -> Any:
    caption = "time of flax.linen / ours, geometric mean over the shapes and the worst of them"
    made = grid(caption, ["norm", "dtype"], ["forward", "worst", "and backward", "worst"])
    for (norm, dtype), group in groups(rows, "norm", "dtype").items():
        of = {row["way"]: row for row in group}
        made.add_row(norm, dtype, *(f"{of[way][key]:.2f}" for way in timing.WAYS for key in ("mean", "worst")))
    return made


def tiny_table(rows: Rows) -> Any:
    columns = list(groups(rows, "mode", "way"))
    caption = "tiny inputs, 2048 numbers: median time of flax.linen / ours"
    headers = [mode if way == "forward" else f"{mode}, and backward" for mode, way in columns]
    made = grid(caption, ["norm", "dtype"], headers)
    for (norm, dtype), group in groups(rows, "norm", "dtype").items():
        of = {(row["mode"], row["way"]): row["ratio"] for row in group}
        made.add_row(norm, dtype, *(f"{of[column]:.2f}" for column in columns))
    return made


def compile_table(rows: Rows, ratios: dict[str, float]) -> Any:
    parts = ("trace", "compile")
    made = grid("a training step of ResNet-50, seconds", ["batch norm of"], [*parts, "together"])
    for row in rows:
        seconds = [row[f"{part}_min_s"] for part in parts]
        made.add_row(row["peer"], *(f"{value:.2f}" for value in (*seconds, sum(seconds))))
    made.add_row("ours / flax.linen", *(f"{ratios[part]:.2f}" for part in (*parts, "together")))
    return made
