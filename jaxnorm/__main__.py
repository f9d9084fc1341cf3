"""The command line: `jaxnorm`, or `python -m jaxnorm`."""

import argparse
import sys
from collections.abc import Sequence
from typing import NoReturn

from jaxnorm import __version__
from jaxnorm.lab import compare, doctor, doctor_options, folding, importing, options
from jaxnorm.lab.bench import command as bench
from jaxnorm.lab.bench import options as bench_options

# the description, the options and what they become; then what does it, by its `run`
COMMANDS = {
    "compare": (options, compare),
    "bench": (bench_options, bench),
    "doctor": (doctor_options, doctor),
    "import": (importing, importing),
    "fold": (folding, folding),
}

EPILOG = (
    "`jaxnorm COMMAND --help` has examples. To recalibrate the statistics of a checkpoint takes the model and data, so "
    "that there is no command for it: see jaxnorm.tools.recalibrate."
)


class Parser(argparse.ArgumentParser):
    """argparse, but a bad value is answered with one line, without the usage above it."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())}\n")


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(prog="jaxnorm", description="Normalization over named axes, for JAX and Flax.", epilog=EPILOG)
    parser.add_argument("--version", action="version", version=f"jaxnorm {__version__}")
    commands = parser.add_subparsers(title="commands", dest="command", required=True)
    parsers: dict[str, Parser] = {}
    for name, (of, _) in COMMANDS.items():
        parsers[name] = commands.add_parser(name, **of.DESCRIPTION)
        of.add_to(parsers[name])
    args = vars(parser.parse_args(argv))
    command = args.pop("command")
    of, does = COMMANDS[command]
    chosen = parsers[command]
    try:
        given = of.Options(**args)
        if command == "bench" and argv is None:  # called from Python, this process is not ours to start again
            bench.restart()
        return does.run(given)
    except options.BadOption as error:
        chosen.error(str(error))
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
