"""What is left of the runs: results.json, and the table at the end."""

import dataclasses
import importlib.metadata
import json
import math
import platform
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh

import jaxnorm
from jaxnorm.lab.data import Dataset
from jaxnorm.lab.options import Options
from jaxnorm.lab.train import QUANTILES, Epoch, Look

COLUMNS = {  # of the table, and how each is shown
    "test_accuracy": ("test accuracy", "{:.1%}"),
    "test_loss": ("test loss", "{:.3f}"),
    "loss": ("train loss", "{:.3f}"),
    "examples_per_second": ("examples/s", "{:,.0f}"),
}


@dataclasses.dataclass
class Run:
    """One norm from one seed, filled while it trains. `after` is there once it is finished."""

    norm: str
    seed: int
    before: Look
    curve: list[Epoch] = dataclasses.field(default_factory=list)
    after: Look | None = None


def by_norm(runs: list[Run]) -> dict[str, list[Run]]:
    """The runs of each norm, in the order in which the norms were trained."""
    return {norm: [run for run in runs if run.norm == norm] for norm in dict.fromkeys(run.norm for run in runs)}


def summary(runs: list[Run]) -> list[dict[str, Any]]:
    """A row per norm: mean and standard deviation over the seeds, after the last epoch. Finished runs only."""
    table = []
    for norm, finished in by_norm([run for run in runs if run.after]).items():
        row: dict[str, Any] = {"norm": norm, "seeds": len(finished)}
        for column in COLUMNS:
            values = np.array([getattr(run.curve[-1], column) for run in finished])
            with np.errstate(invalid="ignore"):  # a net may have diverged
                spread = values.std(ddof=1).item() if len(values) > 1 else None
            row[column] = {"mean": values.mean().item(), "std": spread}
        table.append(row)
    return table


@dataclasses.dataclass(frozen=True)
class Kept:
    """What there is while the training goes on: enough to write it all down, whatever becomes of the training."""

    folder: Path
    facts: dict[str, Any]
    runs: list[Run]


def facts(options: Options, mesh: Mesh, data: Dataset) -> dict[str, Any]:
    """What is known before the training, as results.json says it."""
    config = dataclasses.asdict(options) | {"devices": mesh.size}
    device = mesh.devices[0]
    packages = ("jax", "jaxlib", "flax", "optax", "numpy")
    return {
        "config": {name: str(value) if isinstance(value, Path) else value for name, value in config.items()},
        "versions": {"jaxnorm": jaxnorm.__version__, "python": platform.python_version()}
        | {name: importlib.metadata.version(name) for name in packages},
        "device": {"platform": device.platform, "kind": device.device_kind},
        "data": {
            "train": len(data.x),
            "test": len(data.x_test),
            "shape": data.x.shape[1:],
            "classes": data.classes,
        },
        "quantiles": QUANTILES,
    }


def document(kept: Kept, interrupted: bool) -> dict[str, Any]:
    """All that results.json says."""
    runs = [dataclasses.asdict(run) for run in kept.runs]
    return {"interrupted": interrupted} | kept.facts | {"runs": runs, "table": summary(kept.runs)}


def write(path: Path, results: dict) -> None:
    """As JSON, which has no NaN or infinity: null stands for them."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: plain(item) for name, item in value.items()}
        if isinstance(value, list | tuple):
            return [plain(item) for item in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    path.write_text(json.dumps(plain(results), indent=1, allow_nan=False) + "\n")


def table(rows: list[dict[str, Any]]) -> Any:
    """The summary as a rich table: mean ± standard deviation."""
    from rich.table import Table

    grid = Table(caption="after the last epoch; mean ± standard deviation over the seeds")
    grid.add_column("norm")
    for header, _ in COLUMNS.values():
        grid.add_column(header, justify="right")
    for row in rows:
        cells = []
        for column, (_, form) in COLUMNS.items():
            mean, std = row[column]["mean"], row[column]["std"]
            cells.append(form.format(mean) + ("" if std is None else f" ± {form.format(std)}"))
        grid.add_row(row["norm"], *cells)
    return grid
