"""What `jaxnorm compare` can be asked. Nothing heavy is imported here: a bad value is answered at once."""

import argparse
import difflib
import importlib.util
import math
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxnorm.table import norms

NORMS = ("batch", "layer", "instance", "group", "rms", "none")  # unless others are asked for
EVERY_NORM = (*(name.lower().replace(" ", "-") for name in norms().names), "none")
ACTIVATIONS = ("sigmoid", "relu")
DEVICES = 8

DESCRIPTION: dict[str, Any] = {
    "help": "train one small net per norm on real data, data-parallel, and show what each norm does",
    "description": """\
Train the same small convolutional classifier once per norm, data-parallel over a mesh axis "devices", and compare
loss, accuracy, activations and gradients by depth. Everything but the norm is the same: initial weights, order of
the examples, learning rate. Batch norm takes its statistics over all devices, because "devices" stands in its list
of axes (over="... devices?"), and is evaluated with its running statistics.""",
    "epilog": """\
examples:
  jaxnorm compare
      digits, six norms, eight devices (simulated on CPU), a 5-layer sigmoid net: about a minute
  jaxnorm compare --activation relu --norms batch,none --seeds 5
      is it the norm or the sigmoid? with the spread over five seeds
  jaxnorm compare --norms batch --batch-size 8 --epochs 3 --local-stats
      one example a device, normalized by itself; without --local-stats by the statistics of all eight
  jaxnorm compare --norms batch,ghost-batch,batch-renorm,switchable,weight --epochs 5
      any norm of jaxnorm.norms()
  jaxnorm compare --dataset fashion-mnist --epochs 2 --seeds 1 --batch-size 256
      a few minutes; from the Debian package dataset-fashion-mnist, or from --data DIR with its four .gz files
  jaxnorm compare --dataset mine.npz --out runs/mine
      x (n, h, w) or (n, h, w, c) numbers and y (n,) integers; one fifth is kept for the test
  jaxnorm compare --coordinator host0:9876 --num-processes 2 --process-id 0
      on host0, and the same with --process-id 1 on the other: one training, four of the eight devices on each.
      Under srun, and where TPU_WORKER_HOSTNAMES names several hosts, `jaxnorm compare` alone does it

It leaves results.json, curves.png, activations.png and gradients.png in --out. Ctrl-C writes what there is.""",
    "formatter_class": argparse.RawDescriptionHelpFormatter,
    "allow_abbrev": False,
}


class BadOption(ValueError):
    """A value that cannot be used, in one line that names the option and says what can be."""


@dataclass(frozen=True)
class Options:
    """The checked options of `jaxnorm compare`, named as on the command line."""

    norms: tuple[str, ...] = NORMS
    devices: int | None = None
    batch_size: int = 128
    epochs: int = 15
    seeds: int = 2
    learning_rate: float = 0.1
    depth: int = 5
    activation: str = "sigmoid"
    local_stats: bool = False
    dataset: str = "digits"
    data: Path | None = None
    out: Path | None = None
    coordinator: str | None = None
    num_processes: int | None = None
    process_id: int | None = None
    quiet: bool = False


def add_to(parser: argparse.ArgumentParser) -> None:
    """The options of Options, with its defaults."""

    def add(flag: str, help: str, **kwargs: Any) -> None:
        default = getattr(Options, flag[2:].replace("-", "_"))
        shown = "" if default in (None, False) else f" (default: {kwargs.pop('shown', default)})"
        parser.add_argument(flag, default=default, help=help + shown, **kwargs)

    add(
        "--norms",
        f"which, of {', '.join(EVERY_NORM)}",
        type=some_of(EVERY_NORM, "norm"),
        metavar="A,B,...",
        shown=",".join(NORMS),
    )
    add(
        "--devices",
        f"how many; simulated on CPU, the real ones on GPU and TPU (default: {DEVICES}, or all the real ones if fewer)",
        type=whole,
        metavar="N",
    )
    add("--batch-size", "examples a step, over all devices together", type=whole, metavar="N")
    add("--epochs", "passes over the training data", type=whole, metavar="N")
    add("--seeds", "runs per norm, each with its own weights and order of the examples", type=whole, metavar="N")
    add("--learning-rate", "of SGD with momentum 0.9, falling to 0 along a cosine", type=positive, metavar="X")
    add("--depth", "how many convolutions, each with its norm and activation", type=whole, metavar="N")
    add("--activation", " or ".join(ACTIVATIONS), type=one_of(ACTIVATIONS), metavar="NAME")
    add("--local-stats", "batch norm with each device's own statistics", action="store_true")
    add("--dataset", "digits, fashion-mnist, or a file PATH.npz with x and y", metavar="NAME")
    add("--data", "the folder of fashion-mnist's four .gz files", type=Path, metavar="DIR")
    add("--out", "the folder to write to; files there are replaced (default: runs/DATASET-TIME)", type=Path)
    add("--coordinator", "of several processes: where process 0 listens", type=address, metavar="HOST:PORT")
    add("--num-processes", "how many there are; --devices are those of all together", type=whole, metavar="P")
    add("--process-id", "which one this is, from 0; process 0 alone writes", type=index, metavar="I")
    add("--quiet", "no progress display, only the table at the end", action="store_true")


def whole(text: str) -> int:
    """A whole number from 1."""
    if not (text.isascii() and text.isdigit() and int(text) >= 1):
        raise argparse.ArgumentTypeError(f"must be a whole number from 1, got {text!r}")
    return int(text)


def index(text: str) -> int:
    """A whole number from 0."""
    if not (text.isascii() and text.isdigit()):
        raise argparse.ArgumentTypeError(f"must be a whole number from 0, got {text!r}")
    return int(text)


def address(text: str) -> str:
    """HOST:PORT."""
    host, _, port = text.rpartition(":")
    if not (host and port.isascii() and port.isdigit() and 1 <= int(port) <= 65535):
        raise argparse.ArgumentTypeError(f"must be HOST:PORT with a port from 1 to 65535, got {text!r}")
    return text


def positive(text: str) -> float:
    """A finite number above 0."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"must be a number above 0, got {text!r}")
    return value


def number(least: float, most: float = math.inf) -> Callable[[str], float]:
    """A finite number in a range, its ends included."""
    span = f"from {least:g}" + (f" to {most:g}" if most < math.inf else "")

    def check(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"must be a number, got {text!r}") from None
        if not (least <= value <= most and math.isfinite(value)):
            raise argparse.ArgumentTypeError(f"must be a number {span}, got {text!r}")
        return value

    return check


def one_of(allowed: tuple[str, ...]) -> Callable[[str], str]:
    """One of the names allowed; the nearest is offered where it is not."""

    def check(text: str) -> str:
        if text not in allowed:
            nearest = difflib.get_close_matches(text, allowed, n=1)
            hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
            raise argparse.ArgumentTypeError(f"{text!r} is not one of {', '.join(allowed)}{hint}")
        return text

    return check


def some_of(allowed: tuple[str, ...], kind: str, none: bool = False) -> Callable[[str], tuple[str, ...]]:
    """Names with commas between them, each once; with `none` an empty text is no name at all."""

    def check(text: str) -> tuple[str, ...]:
        if none and not text:
            return ()
        names = tuple(one_of(allowed)(name.strip()) for name in text.split(","))
        if len(set(names)) < len(names):
            raise argparse.ArgumentTypeError(f"names a {kind} twice: {text!r}")
        return names

    return check


def some_patterns(text: str) -> tuple[str, ...]:
    """Globs separated by commas."""
    patterns = tuple(pattern.strip() for pattern in text.split(",") if pattern.strip())
    if not patterns:
        raise argparse.ArgumentTypeError("names no layer")
    return patterns


def need(*modules: str) -> None:
    """Raises where a module of the extra `lab` is not installed."""
    missing = [module for module in modules if importlib.util.find_spec(module) is None]
    if missing:
        raise BadOption(f'needs {", ".join(missing)}, which is not installed: pip install "jaxnorm[lab]"')


def output_folder(out: Path | None, dataset: str) -> Path:
    """The folder to write to, made, and seen to be writable."""
    folder = out or Path("runs") / f"{Path(dataset).stem}-{time.strftime('%Y%m%d-%H%M%S')}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise BadOption(f"argument --out: cannot write to {str(folder)!r}: {error.strerror}") from None
    return folder
