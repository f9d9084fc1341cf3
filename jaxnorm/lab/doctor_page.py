"""The page of `jaxnorm doctor --html`: one file, which asks nothing of the network, in light and in dark."""

import html
import io
from typing import Any

import jaxnorm
from jaxnorm.errors import ArgumentError
from jaxnorm.inspect import Health, plot_statistics
from jaxnorm.lab.doctor_options import Options

STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --faint: #5b6570; --page: #ffffff; --card: #f4f6f8; --line: #d9dee3;
  --wrong: #b3261e; --note: #8a5a00; --good: #1a7f4b; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ec; --faint: #a3adb7; --page: #14171a; --card: #1e2328;
  --line: #353c43; --wrong: #ff8a80; --note: #f0b95c; --good: #6fd6a0; } .picture svg { filter: invert(0.9)
  hue-rotate(180deg); } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 72rem; padding: 1.2rem; background: var(--page); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; margin: 0 0 0.2rem; overflow-wrap: anywhere; } h2 { font-size: 1.1rem; margin: 2rem 0 0.6rem; }
.faint { color: var(--faint); } .ok { color: var(--good); }
.wrong { color: var(--wrong); } .note { color: var(--note); }
.sum { font-size: 1.15rem; font-weight: 600; margin: 0.6rem 0; }
ul.found { list-style: none; padding: 0; margin: 0; }
ul.found li { background: var(--card); border-left: 4px solid currentColor; border-radius: 4px; margin: 0.5rem 0;
  padding: 0.5rem 0.8rem; overflow-wrap: anywhere; } ul.found span { color: var(--ink); }
.wide { overflow-x: auto; } .picture svg { width: 100%; min-width: 44rem; height: auto; }
table { border-collapse: collapse; font-size: 0.85rem; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: 0.3rem 0.7rem 0.3rem 0; border-bottom: 1px solid var(--line); white-space: nowrap; }
td:last-child { white-space: normal; min-width: 18rem; } th { color: var(--faint); font-weight: 600; }
"""
WORDS = {"wrong": "What is wrong", "note": "Worth knowing: no faults, sound networks have these too"}


def page(options: Options, tree: Any, health: Health) -> str:
    """The whole page."""
    name = html.escape(options.checkpoint.name or str(options.checkpoint))
    verdict = '<p class="sum ok">Nothing is wrong.</p>' if health.ok else ""
    found = "".join(_found(grade, rows) for grade, rows in (("wrong", health.wrong), ("note", health.notes)))
    momentum = "" if options.momentum is None else f", momentum {options.momentum:g}"
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{name}: jaxnorm doctor</title><style>{STYLE}</style></head><body>
<h1>{name}</h1>
<p class="faint">jaxnorm doctor {jaxnorm.__version__}, epsilon {options.epsilon:g}{momentum}</p>
<p class="sum">{html.escape(health.title)}</p>{verdict}{found}
<h2>Statistics by layer</h2><div class="wide picture">{_picture(options, tree)}</div>
<h2>All norms</h2><div class="wide">{_table(health)}</div>
</body></html>
"""


def _found(grade: str, rows: tuple[dict[str, Any], ...]) -> str:
    if not rows:
        return ""
    items = "".join(
        f'<li class="{grade}"><b>{html.escape(row["norm"])}</b><br><span>{html.escape(row["finding"])}</span></li>'
        for row in rows
    )
    return f'<h2>{WORDS[grade]}</h2><ul class="found">{items}</ul>'


def _table(health: Health) -> str:
    return health._repr_html_().partition("</p>")[2]


def _picture(options: Options, tree: Any) -> str:
    """As SVG, without the lines before it that a page cannot have."""
    out = io.StringIO()
    try:
        picture = plot_statistics(tree, where=options.where, epsilon=options.epsilon)
    except ArgumentError as error:
        return html.escape(error.text)
    picture.savefig(out, format="svg", transparent=True, metadata={"Date": None})
    text = out.getvalue()
    return text[text.index("<svg") :]
