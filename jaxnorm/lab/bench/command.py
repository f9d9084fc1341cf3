"""`jaxnorm bench`: times every norm beside those of other frameworks, and writes what came out."""

import os
import sys
from collections.abc import Callable
from functools import partial

from jaxnorm.lab.bench.options import Options
from jaxnorm.lab.options import need, output_folder

ALLOCATOR = {  # of glibc: keep what is freed, in one heap of huge pages
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": "4294967296",
    "MALLOC_TRIM_THRESHOLD_": "8589934592",
    "MALLOC_TOP_PAD_": "268435456",
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
}


def has_allocator() -> bool:
    return sys.platform == "linux" and all(os.environ.get(name) == value for name, value in ALLOCATOR.items())


def restart() -> None:
    """Starts this process again with the allocator that keeps its memory, which is chosen when a process starts.

    With the command line it was given, so that `python -m jaxnorm` stays that. On Linux; the second time it does
    nothing.
    """
    if sys.platform == "linux" and not has_allocator():
        sys.stdout.flush()
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**os.environ, **ALLOCATOR})


def run(options: Options) -> int:
    """Does what the options say.

    Returns:
        The exit status: 0; 130 where Ctrl-C cut it short, 1 where a framework failed. What there is then is written.

    Raises:
        BadOption: before anything is compiled.
    """
    need("matplotlib", "rich")
    folder = output_folder(options.out, "bench")

    import jax
    from rich.console import Console

    from jaxnorm.lab.bench import cases, peers, plots, report
    from jaxnorm.lab.report import write

    console = Console(highlight=False)
    left_out = peers.left_out(options.peers)
    for name, reason in left_out.items():
        console.print(f"without {name}: {reason}")
    found = tuple(name for name in options.peers if name not in left_out)
    mb = options.mb or (cases.MB if jax.default_backend() == "cpu" else 256)
    kept = report.Kept(report.facts(options, mb, found, left_out, has_allocator()))
    status = 0
    try:
        work(options, mb, ("jaxnorm", *found), kept, console)
    except KeyboardInterrupt:
        status = 130
        print("jaxnorm bench: interrupted; writing what there is", file=sys.stderr)
    except Exception as error:  # of a framework, or out of memory: what took minutes until then is kept
        status = 1
        said = str(error).strip().splitlines() or [""]
        print(f"jaxnorm bench: {type(error).__name__}: {said[0]}; writing what there is", file=sys.stderr)
    results = report.document(kept, interrupted=status != 0)
    path = folder / f"{report.base_name(kept.facts)}.json"
    write(path, results)
    written = [path]
    if results["times_limit"]:
        written.append(path.with_suffix(".png"))
        plots.draw(written[-1], results)
    for table in report.tables(results):
        console.print(table)
    for path in written:
        print(path)
    return status


def work(options: Options, mb: float, names: tuple[str, ...], kept, console) -> None:
    """Measures part by part, keeps the rows of each that is finished, and shows how far it is."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from jaxnorm.lab.bench import cases, resnet, tiny

    columns = (TextColumn("{task.description:>8}"), BarColumn(20), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TextColumn("{task.fields[now]}"), console=console) as progress:

        def task(part: str, total: int) -> Callable[..., None]:
            """What moves the bar of a part on, if the part is wanted."""
            made = progress.add_task(part, total=total, now="", visible=part in options.parts)
            return lambda now="", advance=0: progress.update(made, advance=advance, now=now)

        todo = [
            (norm, dtype, cases.scaled(shape, mb))
            for norm in options.norms
            for dtype in options.dtypes
            for shape in cases.SHAPES[norm]
        ]
        tell_norms = task("norms", len(todo))
        tell_tiny = task("tiny", len(options.norms) * len(options.dtypes) * len(tiny.CALLS))
        tell_compile = task("compile", resnet.RUNS * len(resnet.NORMS))
        if "norms" in options.parts:
            for norm, dtype, shape in todo:
                tell_norms(f"{norm} {dtype} {'x'.join(map(str, shape))}")
                kept.measurements += cases.measure(norm, dtype, shape, names, options.runs, options.mean)
                tell_norms(advance=1)
        if "tiny" in options.parts:
            for norm in options.norms:
                for dtype in options.dtypes:
                    tell_tiny(f"{norm} {dtype}")
                    kept.tiny += tiny.measure(norm, dtype, options.runs, partial(tell_tiny, advance=1))
        if "compile" in options.parts:
            tell_compile("ResNet-50")
            kept.compile += resnet.measure(tick=partial(tell_compile, advance=1))
