"""`jaxnorm import`: a checkpoint of one framework as a file of another, without the model."""

import argparse
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxnorm.errors import ArgumentError
from jaxnorm.lab.options import BadOption, one_of, some_patterns

FRAMEWORKS = ("flax", "torch", "keras", "haiku", "equinox", "onnx")  # those of jaxnorm.tools.models, which is heavy
DESCRIPTION: dict[str, Any] = {
    "help": "convert a checkpoint of torch, Keras, ONNX, Haiku, Equinox or Flax to Flax's or torch's names and layouts",
    "description": """\
Write a checkpoint's layers in another framework's layouts and under its names of variables. Layers keep their own
names: features.0.weight becomes params/features/0/kernel, transposed, and running_var batch_stats/.../var. The table
has a row for each layer, with what was changed and what its norm must be built with: momentum, epsilon, whether the
running variance has Bessel's correction. What a file does not say is the framework's default, and marked so. An
optimizer's state is passed over.""",
    "epilog": """\
examples:
  jaxnorm import mobilenet_v2.pth mobilenet_v2.msgpack
      for flax.serialization.msgpack_restore, as {"params": ..., "batch_stats": ...}
  jaxnorm import model.keras model.safetensors --to torch
      a state_dict, flat
  jaxnorm import bert.safetensors bert.msgpack --embedding "*embeddings*" --epsilon 1e-12
      a table of embeddings looks like a kernel, and would be transposed
  jaxnorm import gan.pth gan.msgpack --transposed "up*"
      convolutions that are transposed ones

Reads .pth .pt .bin (without torch, and without running what a pickle says), .safetensors, .npz, .msgpack, .keras, .h5,
.onnx and orbax folders; writes .msgpack, .safetensors, .npz, and .pth where torch is installed. To give layers other
names takes the model: jaxnorm.tools.convert has it as a template, and checks every name and shape.""",
    "formatter_class": argparse.RawDescriptionHelpFormatter,
    "allow_abbrev": False,
}


@dataclass(frozen=True)
class Options:
    """The checked options of `jaxnorm import`, named as on the command line."""

    source: Path
    out: Path
    framework: str | None = None
    to: str = "flax"
    where: tuple[str, ...] | None = None
    embedding: tuple[str, ...] = ()
    transposed: tuple[str, ...] = ()
    epsilon: float | None = None
    momentum: float | None = None


def add_to(parser: argparse.ArgumentParser) -> None:
    """The options of Options, with its defaults."""

    def add(flag: str, help: str, **kwargs: Any) -> None:
        parser.add_argument(flag, default=getattr(Options, flag[2:]), help=help, **kwargs)

    parser.add_argument("source", type=Path, metavar="IN", help="the checkpoint: a file, or an orbax folder")
    parser.add_argument("out", type=Path, metavar="OUT", help="the file to write; its suffix says the format")
    parser.add_argument(
        "--from", dest="framework", type=one_of(FRAMEWORKS), metavar="FRAMEWORK",
        help=f"whose the file is, where its names do not tell: {', '.join(FRAMEWORKS)}",
    )  # fmt: skip
    add("--to", "flax or torch (default: flax)", type=one_of(("flax", "torch")), metavar="FRAMEWORK")
    add("--where", 'only the layers whose path fits, as "encoder.*"', type=some_patterns, metavar="A,B,...")
    add("--embedding", "layers that are tables, not kernels", type=some_patterns, metavar="A,B,...")
    add("--transposed", "convolutions that are transposed", type=some_patterns, metavar="A,B,...")
    add("--epsilon", "of all its norms, whatever the file says", type=float, metavar="X")
    add(
        "--momentum", "of all its batch norms, whatever the file says: the part of the old statistics that is kept "
        "(torch's is one minus it)", type=float, metavar="X",
    )  # fmt: skip


def run(options: Options) -> int:
    """Does what the options say.

    Returns:
        The exit status, 0.

    Raises:
        BadOption: when the file cannot be read or written, or what is in it is not certain.
    """
    from jaxnorm.tools import import_file

    given = {name: getattr(options, name) for name in ("epsilon", "momentum") if getattr(options, name) is not None}
    try:
        report = import_file(
            options.source, options.out, to=options.to, where=options.where, framework=options.framework,
            embedding=options.embedding, transposed=options.transposed, settings=given,
        )  # fmt: skip
    except ArgumentError as error:
        raise BadOption(_as_options(error.text)) from None
    except OSError as error:
        raise BadOption(f"cannot write {str(options.out)!r}: {error.strerror}") from None
    print(report)
    print(options.out)
    return 0


def _as_options(text: str) -> str:
    """A message of jaxnorm.tools, with the options of the command line for Python's arguments."""
    text = text.replace('settings={"momentum": decay_rate}', "--momentum DECAY_RATE")
    text = text.replace("Give framework= one of", "Give --from, one of")
    return re.sub(r"\b(where|embedding|transposed)=(?=['\"])", r"--\1 ", text)
