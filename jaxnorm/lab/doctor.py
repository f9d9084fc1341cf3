"""`jaxnorm doctor`: what is wrong with the norms of a checkpoint, in the terminal and as a page."""

from typing import Any

from jaxnorm.errors import ArgumentError
from jaxnorm.inspect import Health, report
from jaxnorm.lab.doctor_options import Options
from jaxnorm.lab.options import BadOption, need
from jaxnorm.tools.files import read
from jaxnorm.tools.report import Report


def run(options: Options) -> int:
    """Does what the options say.

    Returns:
        The exit status: 0 when nothing is wrong, 1 when something is.

    Raises:
        BadOption: when the file cannot be read, has no norm, or the page cannot be written.
    """
    if options.html:
        need("matplotlib")
    try:
        tree = read(options.checkpoint)
        health = report(
            tree,
            where=options.where,
            momentum=options.momentum,
            epsilon=options.epsilon,
            debias=options.debias,
            updates=options.updates,
        )
    except ArgumentError as error:
        raise BadOption(error.text) from None
    if not health.rows:
        raise BadOption(f"argument CHECKPOINT: there is no norm in {str(options.checkpoint)!r}")
    print(terminal(str(options.checkpoint), health))
    if options.html:
        _write(options, tree, health)
    return 0 if health.ok else 1


def terminal(name: str, health: Health) -> str:
    """The table without its long column, then what was found, the worst last, where the eye is."""
    columns = [column for column in health.columns if column != "finding"]
    found = [f"{row['grade']:5}  {row['norm']}: {row['finding']}" for row in (*health.notes, *health.wrong)]
    lines = "\n".join([str(Report(name, columns, health.rows)), *([""] if found else []), *found, "", health.title])
    return "".join(c if c.isprintable() or c == "\n" else "?" for c in lines)  # a name may hold orders to the terminal


def _write(options: Options, tree: Any, health: Health) -> None:
    from jaxnorm.lab.doctor_page import page

    assert options.html is not None
    try:
        options.html.write_text(page(options, tree, health), encoding="utf-8")
    except OSError as error:
        raise BadOption(f"argument --html: cannot write to {str(options.html)!r}: {error.strerror}") from None
    print(options.html)
