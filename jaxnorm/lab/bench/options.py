"""What `jaxnorm bench` can be asked. Nothing heavy is imported here: a bad value is answered at once."""

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxnorm.lab.options import positive, some_of, whole

NORMS = ("batch", "layer", "rms", "instance", "group")
DTYPES = ("float32", "bfloat16")
PEERS = ("flax.linen", "flax.nnx", "haiku", "equinox", "keras", "torch")
PARTS = ("norms", "tiny", "compile")

DESCRIPTION: dict[str, Any] = {
    "help": "time every norm against those of flax, haiku, equinox, keras and torch, and against the limit",
    "description": """\
Time each norm forward, and forward with its backward pass, beside the same norm of the other frameworks that are
installed: in turn in one process, minimum and median after warming up. The limit is memory traffic: the bytes that a
norm cannot but read and write, at the bandwidth of a copy measured in the same rounds. 1 is as fast as it can be, 2
takes twice as long. Then the calls on tiny inputs, where the arithmetic is nothing, and what it takes to trace and
compile a 50-layer ResNet with batch norm, ours and flax.linen's.""",
    "epilog": """\
examples:
  jaxnorm bench
      all of it, some six minutes on two cores
  jaxnorm bench --norms layer,rms --dtypes bfloat16 --peers torch --parts norms
      two norms against torch alone
  jaxnorm bench --mb 64 --runs 100
      larger arrays, and a steadier minimum
  jaxnorm bench --norms batch --parts norms --mean 3
      where means are far from 0, which takes us two sums more on CPU
  jaxnorm bench --peers "" --parts compile
      the ResNet only

pip install "jaxnorm[bench]" has all frameworks but torch, whose builds for GPUs are gigabytes: install the one you
mean. On Linux it starts itself once more, with an allocator that keeps its memory, for every framework alike: fresh
large arrays cost page faults that swamp the norms. Leave the machine alone meanwhile.

It leaves DATE-CHIP.json and DATE-CHIP.png in --out, where CHIP is cpu or the accelerator. Ctrl-C writes what there
is.""",
    "formatter_class": argparse.RawDescriptionHelpFormatter,
    "allow_abbrev": False,
}


@dataclass(frozen=True)
class Options:
    """The checked options of `jaxnorm bench`, named as on the command line."""

    norms: tuple[str, ...] = NORMS
    dtypes: tuple[str, ...] = DTYPES
    peers: tuple[str, ...] = PEERS
    parts: tuple[str, ...] = PARTS
    mb: float | None = None
    mean: float = 0.5
    runs: int = 40
    out: Path | None = None


def add_to(parser: argparse.ArgumentParser) -> None:
    """The options of Options, with its defaults."""

    def add(flag: str, help: str, **kwargs: Any) -> None:
        parser.add_argument(flag, default=getattr(Options, flag[2:]), help=help, **kwargs)

    add("--norms", f"which, of {','.join(NORMS)} (default: all)", type=some_of(NORMS, "norm"), metavar="A,B,...")
    add("--dtypes", "of x and y, not of scale and bias (default: both)", type=some_of(DTYPES, "dtype"), metavar="A,B")
    add(
        "--peers",
        f"against whom, of {','.join(PEERS)} (default: all that are installed)",
        type=some_of(PEERS, "peer", none=True),
        metavar="A,B,...",
    )
    add("--parts", "what, of norms,tiny,compile (default: all)", type=some_of(PARTS, "part"), metavar="A,B,...")
    add("--mb", "megabytes of x in float32 (default: 16, on GPU and TPU 256)", type=positive, metavar="X")
    add("--mean", "of x, in standard deviations (default: 0.5)", type=positive, metavar="X")
    add("--runs", "how often each is timed (default: 40)", type=whole, metavar="N")
    add("--out", "the folder to write to (default: runs/bench-TIME)", type=Path, metavar="DIR")
