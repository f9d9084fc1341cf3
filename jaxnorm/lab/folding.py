"""`jaxnorm fold`: the batch norms of a checkpoint taken into the layers before them, without the model."""

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxnorm.errors import ArgumentError
from jaxnorm.lab.options import BadOption

DESCRIPTION: dict[str, Any] = {
    "help": "take the batch norms of a checkpoint into the dense or convolution layers before them",
    "description": """\
Fold batch norms into the layers before them, for inference: kernel and bias take up the norm's statistics, scale and
bias, and its variables go. The result is for the same model built without these norms, with a bias in every layer that
took one up. Which layer stands before which norm, that no activation lies between them, and epsilon, a file does not
tell: --pair and --epsilon say it. With the model at hand jaxnorm.tools.fold sees all that by itself, and folds into the
layer after a norm as well.""",
    "epilog": """\
examples:
  jaxnorm fold model.safetensors folded.safetensors --pair "blocks/*/bn=blocks/*/conv"
      each norm with the layer of the same block; * stands for one word of the path, the same on both sides
  jaxnorm fold mobilenet_v2.pth folded.msgpack --pair "features.*.conv.*.1=features.*.conv.*.0" \\
      --pair "features.*.conv.3=features.*.conv.2"
      several patterns; norms that none names stay as they are
  jaxnorm fold generator.npz folded.npz --pair "up{i}/bn=up{i}/conv" --out-axis 1
      torch's transposed convolutions, whose outputs lie along axis 1

Reads what `jaxnorm import` reads, writes what it writes, under the names and layouts that the file has.""",
    "formatter_class": argparse.RawDescriptionHelpFormatter,
    "allow_abbrev": False,
}


@dataclass(frozen=True)
class Options:
    """The checked options of `jaxnorm fold`, named as on the command line."""

    source: Path
    out: Path
    pair: tuple[tuple[str, str], ...] = ()
    epsilon: float = 1e-5
    out_axis: int | None = None


def add_to(parser: argparse.ArgumentParser) -> None:
    """The options of Options, with its defaults."""
    parser.add_argument("source", type=Path, metavar="IN", help="the checkpoint: a file, or an orbax folder")
    parser.add_argument("out", type=Path, metavar="OUT", help="the file to write; its suffix says the format")
    parser.add_argument(
        "--pair", type=_pair, action="append", required=True, metavar="NORM=LAYER",
        help="the path of a norm and of the layer before it; may be given several times",
    )  # fmt: skip
    parser.add_argument(
        "--epsilon", type=float, default=Options.epsilon, metavar="X", help="of these norms (default: 1e-5)"
    )
    parser.add_argument(
        "--out-axis", type=int, default=None, metavar="N",
        help="along which axis of the kernels their outputs lie (default: by their name, weight 0, kernel and w -1)",
    )  # fmt: skip


def run(options: Options) -> int:
    """Does what the options say.

    Returns:
        The exit status, 0.

    Raises:
        BadOption: when the file cannot be read or written, or a pair does not fit.
    """
    from jaxnorm.tools import fold_pairs, read, write

    pairs = dict(options.pair)
    if len(pairs) < len(options.pair):
        raise BadOption("argument --pair: one norm is named twice")
    try:
        folded, report = fold_pairs(
            read(options.source), pairs, epsilon=options.epsilon, out_axis=options.out_axis
        )  # fmt: skip
        write(options.out, folded)
    except ArgumentError as error:
        raise BadOption(error.text) from None
    except OSError as error:
        raise BadOption(f"cannot write {str(options.out)!r}: {error.strerror}") from None
    print(report)
    print(options.out)
    return 0


def _pair(text: str) -> tuple[str, str]:
    norm, found, layer = text.partition("=")
    if not (norm.strip() and found and layer.strip()):
        raise argparse.ArgumentTypeError(f"must be NORM=LAYER, got {text!r}")
    return norm.strip(), layer.strip()
