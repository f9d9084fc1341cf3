"""What jaxnorm says when a call is wrong: which call, what it was given, which name is at fault, what to do."""

import difflib
import functools
import re
from collections.abc import Callable, Iterable
from typing import TypeVar

F = TypeVar("F", bound=Callable)


class _Error(ValueError):
    """A ValueError that learns the name of the public call on its way out (see `named`)."""

    def __init__(self, text: str):
        super().__init__(text)
        self.text = text
        self.call = ""

    def __str__(self) -> str:
        return f"{self.call}: {self.text}" if self.call else self.text


class LayoutError(_Error):
    """A layout, an array or a list of names that do not fit each other."""


class ArgumentError(_Error):
    """A number outside its range, or an argument of the wrong kind."""


class AxisError(_Error):
    """A mapped axis (of vmap, pmap or shard_map) that is missing, ambiguous or cannot be reduced over."""


def named(fn: F) -> F:
    """Let errors raised inside `fn` say its name. The outermost public call wins: it is the one the user wrote."""

    @functools.wraps(fn)
    def wrapper(*args, **kwargs):
        try:
            return fn(*args, **kwargs)
        except _Error as error:
            home = fn.__module__.split(".")[1]
            error.call = f"jaxnorm.{f'{home}.' if home in ('tools', 'inspect', 'nnx') else ''}{fn.__name__}"
            raise

    return wrapper  # type: ignore[return-value]


def nearest(name: str, known: Iterable[str]) -> str:
    """' Did you mean ...?' when one of the known names is close, otherwise nothing."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f" Did you mean {close[0]!r}?" if close else ""


def point(text: str, name: str, label: str = "") -> str:
    """Two lines: the labelled text, and a caret under the last place where `name` stands in it."""
    places = list(re.finditer(rf"(?<![\w.]){re.escape(name)}(?![\w.])", text)) or list(
        re.finditer(re.escape(name), text)
    )
    lead = f'  {label} "' if label else '  "'
    return f'{lead}{text}"' + (f"\n{' ' * (len(lead) + places[-1].start())}{'^' * len(name)}" if places else "")
