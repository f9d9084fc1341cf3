"""`jaxnorm fold`: the batch norms of a checkpoint taken into the layers before them, without the model."""

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxnorm.errors import ArgumentError
from jaxnorm.lab.options import BadOption

if TYPE_CHECKING:
    from jaxnorm.tools.files import Checkpoint

DESCRIPTION: dict[str, Any] = {
    "help": "take the batch norms of a checkpoint into the dense or convolution layers before them",
    "description": """\
Fold batch norms into the layers before them, for inference: kernel and bias take up the norm's statistics, scale and
bias, and its variables go. The result is for the same model built without these norms, with a bias in every layer that
took one up. Which layer stands before which norm, and that no activation lies between them, a file does not tell:
--pair says it. Epsilon, and which convolutions are transposed, Keras's and ONNX's files say; for others --epsilon and
--out-axis do, or the framework's defaults hold. The table shows the epsilon of each norm, and who said it. With the
model at hand jaxnorm.tools.fold sees all that by itself, and folds into the layer after a norm as well.""",
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
    epsilon: float | None = None
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
        "--epsilon", type=float, default=None, metavar="X",
        help="of all these norms (default: what the file says of each, else that of the framework whose names it has)",
    )  # fmt: skip
    parser.add_argument(
        "--out-axis", type=int, default=None, metavar="N",
        help="along which axis of the kernels their outputs lie (default: by what the file says, else by their name: "
        "weight 0, kernel and w -1)",
    )  # fmt: skip


def run(options: Options) -> int:
    """Does what the options say.

    Returns:
        The exit status, 0.

    Raises:
        BadOption: when the file cannot be read or written, or a pair does not fit.
    """
    from jaxnorm.tools import fold_pairs, write
    from jaxnorm.tools.files import load
    from jaxnorm.tools.report import Report

    pairs = dict(options.pair)
    if len(pairs) < len(options.pair):
        raise BadOption("argument --pair: one norm is named twice")
    try:
        checkpoint = load(options.source)
        epsilons, whence = _epsilons(checkpoint, options.epsilon)
        axes = options.out_axis if options.out_axis is not None else _out_axes(checkpoint)
        folded, report = fold_pairs(checkpoint.tree, pairs, epsilon=epsilons, out_axis=axes)
        write(options.out, folded)
    except ArgumentError as error:
        raise BadOption(_as_option(error.text)) from None
    except OSError as error:
        raise BadOption(f"cannot write {str(options.out)!r}: {error.strerror}") from None
    columns = list(report.columns)
    columns.insert(columns.index("epsilon") + 1, "said by")
    rows = [{**row, "said by": whence[row["norm"]] if "into" in row else None} for row in report.rows]
    print(_as_option(str(Report(report.title, columns, rows))))
    print(options.out)
    return 0


def _epsilons(checkpoint: "Checkpoint", given: float | None) -> tuple[dict[str, float], dict[str, str]]:
    """Epsilon of each batch norm, and who says it: the user, the file, or the framework."""
    from jaxnorm.tools import find_norms
    from jaxnorm.tools.fold import default_epsilon

    epsilons, whence = {}, {}
    for norm in find_norms(checkpoint.tree):
        if norm.kind != "batch":
            continue
        said = checkpoint.settings.get(norm.path, {})
        if given is not None:
            epsilons[norm.path], whence[norm.path] = given, "--epsilon"
        elif "epsilon" in said:
            epsilons[norm.path], whence[norm.path] = said["epsilon"], "the file"
        else:
            epsilons[norm.path], framework = default_epsilon(checkpoint.tree, checkpoint.framework)
            whence[norm.path] = f"default of {framework}"
    return epsilons, whence


def _out_axes(checkpoint: "Checkpoint") -> dict[str, int]:
    """Along which axis the outputs of the kernels lie, of those of which the file says whether they are transposed."""
    from jaxnorm.tools.layouts import CONV, TRANSPOSED
    from jaxnorm.tools.models import take_apart

    axes: dict[str, int] = {}
    if checkpoint.framework in ("keras", "onnx"):
        for path, layer in take_apart(checkpoint.tree, checkpoint.framework).layers.items():
            said = checkpoint.settings.get(path, {} if checkpoint.framework == "onnx" else None)
            if layer.kind == "kernel" and said is not None:
                order = (TRANSPOSED if said.get("transposed") else CONV)[checkpoint.framework]
                axes[path] = order.index("o") - (len(order) if order[0] == "*" else 0)
    return axes


def _as_option(text: str) -> str:
    return text.replace("out_axis", "--out-axis").replace("say epsilon", "say --epsilon")


def _pair(text: str) -> tuple[str, str]:
    norm, found, layer = text.partition("=")
    if not (norm.strip() and found and layer.strip()):
        raise argparse.ArgumentTypeError(f"must be NORM=LAYER, got {text!r}")
    return norm.strip(), layer.strip()
