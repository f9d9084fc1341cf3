"""What `jaxnorm doctor` can be asked. Nothing heavy is imported here: a bad value is answered at once."""

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxnorm.lab.options import index, number, some_patterns

DESCRIPTION: dict[str, Any] = {
    "help": "look through a checkpoint's norms: what is wrong with them, and what is worth knowing",
    "description": """\
Read the norm layers of a checkpoint and say what is wrong with them: numbers that are not finite, variances that are
negative, collapsed or exploded, statistics that were lost, renamed, never updated or left apart on several devices,
scales that died, shapes that do not fit. Beside that, notes: what sound networks have too. The model itself is not
needed, and no code of the checkpoint is run.""",
    "epilog": """\
examples:
  jaxnorm doctor model.msgpack
      flax.serialization.to_bytes of {"params": ..., "batch_stats": ...}
  jaxnorm doctor checkpoints/1000
      a folder that orbax wrote, or a step of its CheckpointManager
  jaxnorm doctor model.msgpack --momentum 0.99 --updates 300
      Flax's norms count nothing: were 300 steps enough to leave the initial statistics behind?
  jaxnorm doctor mobilenet_v2.pth --momentum 0.9
      a torch state_dict; its norms count their updates, so that the momentum tells whether these were enough
  jaxnorm doctor model.safetensors --where "encoder/*" --html report.html
      some of the norms, and a page to send to a colleague: one file, with a picture of the statistics by layer

Also .npz, .pt, .bin, .h5, .keras and .onnx. The exit status is 0 when nothing is wrong, 1 when something is, 2 when the
file cannot be read: put it at the end of the training script.""",
    "formatter_class": argparse.RawDescriptionHelpFormatter,
    "allow_abbrev": False,
}


@dataclass(frozen=True)
class Options:
    """The checked options of `jaxnorm doctor`, named as on the command line."""

    checkpoint: Path
    html: Path | None = None
    momentum: float | None = None
    epsilon: float = 1e-5
    debias: bool = False
    updates: int | None = None
    where: tuple[str, ...] | None = None


def add_to(parser: argparse.ArgumentParser) -> None:
    """The options of Options, with its defaults."""

    def add(flag: str, help: str, **kwargs: Any) -> None:
        parser.add_argument(flag, default=getattr(Options, flag[2:]), help=help, **kwargs)

    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="the file or orbax folder")
    add("--html", "write a page, one file, as well", type=Path, metavar="FILE")
    add(
        "--momentum",
        "the part of the old statistics that was kept in training (torch's is one minus it)",
        type=number(0, 1),
        metavar="X",
    )
    add("--epsilon", "what was added to the variances (default: 1e-5)", type=number(0), metavar="X")
    add("--debias", "the averages were bias-corrected", action="store_true")
    add(
        "--updates",
        "how many steps it was trained, for norms that do not count them (default: what a training state says)",
        type=index,
        metavar="N",
    )
    add("--where", 'only the norms whose path fits, as "encoder/*,head/bn"', type=some_patterns, metavar="A,B,...")
