"""The command line: `jaxnorm`, or `python -m jaxnorm`."""

import argparse
import sys
from collections.abc import Sequence
from typing import NoReturn

from jaxnorm import __version__
from jaxnorm.lab import compare, options


class Parser(argparse.ArgumentParser):
    """argparse, but a bad value is answered with one line, without the usage above it."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())}\n")


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(prog="jaxnorm", description="Normalization over named axes, for JAX and Flax.")
    parser.add_argument("--version", action="version", version=f"jaxnorm {__version__}")
    commands = parser.add_subparsers(title="commands", dest="command", required=True)
    command = commands.add_parser("compare", **options.DESCRIPTION)
    options.add_to(command)
    args = vars(parser.parse_args(argv))
    del args["command"]
    try:
        return compare.run(options.Options(**args))
    except options.BadOption as error:
        command.error(str(error))
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
