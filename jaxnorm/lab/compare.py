"""`jaxnorm compare`: trains one small classifier per norm, shows how it goes, and writes what came out."""

import contextlib
import sys
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

from jaxnorm.lab import data as datasets
from jaxnorm.lab import processes
from jaxnorm.lab.options import DEVICES, BadOption, Options, need, output_folder


def run(options: Options) -> int:
    """Does what the options say.

    Returns:
        The exit status: 0; 130 where Ctrl-C cut it short, 1 where a peer process is gone. What there is then is
        written all the same, by process 0.

    Raises:
        BadOption: before anything is compiled.
    """
    need("matplotlib", "rich")
    options = processes.located(options)
    kept = None
    status = 0

    def keep(now: Any) -> None:
        nonlocal kept
        kept = now

    try:
        if options.num_processes == 1:
            work(options, keep)
        else:
            processes.in_child(work, options, keep)
    except KeyboardInterrupt:
        status = 130
        print("jaxnorm compare: interrupted; writing what there is", file=sys.stderr)
    except processes.Lost as lost:
        status = 1
        print(f"jaxnorm compare: {lost}", file=sys.stderr)
    if kept:
        write(kept, interrupted=status != 0)
    return status


def write(kept: Any, interrupted: bool) -> None:
    """The folder and the table."""
    from rich.console import Console

    from jaxnorm.lab import plots, report

    results = report.document(kept, interrupted)
    report.write(kept.folder / "results.json", results)
    pictures = plots.draw(kept.folder, kept.runs)
    console = Console(highlight=False)
    console.show_cursor()  # a progress display that died has hidden it
    if results["table"]:
        console.print(report.table(results["table"]))
    for path in (kept.folder / "results.json", *pictures):
        print(path)


def work(options: Options, keep: Callable[[Any], None], join: Callable[[], None] = lambda: None) -> None:
    """Trains, alone or as one of several processes, and keeps a report.Kept whenever there is more of it."""
    data = datasets.load(options.dataset, options.data)
    if options.batch_size > len(data.x):
        raise BadOption(f"argument --batch-size: {options.batch_size} is more than the {len(data.x)} training examples")
    join()  # as late as can be: before it faults are answered at once, after it the others wait for this process
    mesh = mesh_for(options)
    first = jax.process_index() == 0
    folder = output_folder(options.out, options.dataset) if first else None
    if options.num_processes != 1:
        processes.agree(options, data.x, data.y, data.x_test, data.y_test)

    from rich.console import Console

    from jaxnorm.lab import report

    runs: list[report.Run] = []
    facts = report.facts(options, mesh, data)

    def keep_runs() -> None:
        if folder:
            keep(report.Kept(folder, facts, runs))

    keep_runs()
    train_all(options, mesh, data, runs, Console(highlight=False, quiet=not first), keep_runs)


def mesh_for(options: Options) -> Mesh:
    """The devices to train on, as many of each process. Starts JAX, with simulated devices where it runs on CPU."""
    count = options.num_processes or 1
    check_parts(options.batch_size, options.devices or 1)
    if options.devices and options.devices % count:
        raise BadOption(f"argument --devices: {options.devices} is not a multiple of the {count} processes")
    wanted = max(1, (options.devices or DEVICES) // count)
    with contextlib.suppress(RuntimeError):  # JAX was started before: there are as many as there are
        jax.config.update("jax_num_cpu_devices", wanted)
    there = jax.devices()
    each = [[device for device in there if device.process_index == i] for i in range(jax.process_count())]
    fewest = min(map(len, each))
    if options.devices and wanted > fewest:
        platform = there[0].platform
        advice = "JAX was started before with fewer" if platform == "cpu" else "JAX_PLATFORMS=cpu simulates them"
        has = f"{platform} has {fewest}" + (f" in each of the {count} processes" if count > 1 else "")
        raise BadOption(f"argument --devices: {options.devices} wanted, {has}; {advice}")
    devices = [device for of_process in each for device in of_process[: min(wanted, fewest)]]
    check_parts(options.batch_size, len(devices))
    if count > 1:  # as listed: each process has the rows of the batch that lie together
        return Mesh(np.array(devices), ("devices",), axis_types=(AxisType.Auto,))
    return jax.make_mesh((len(devices),), ("devices",), axis_types=(AxisType.Auto,), devices=devices)


def check_parts(batch_size: int, devices: int) -> None:
    if batch_size % devices:
        raise BadOption(f"argument --batch-size: {batch_size} is not a multiple of the {devices} devices")


def train_all(
    options: Options, mesh: Mesh, data: datasets.Dataset, runs: list, console: Any, keep_runs: Callable[[], None]
) -> None:
    """Trains every norm from every seed, puts each run into `runs` once it has begun, and tells what there is."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    from jaxnorm.lab import report, train
    from jaxnorm.lab.model import Classifier

    optimizer = train.sgd(options.learning_rate, options.epochs * (len(data.x) // options.batch_size))
    first = train.first_batch(data, options.batch_size, mesh)
    columns = (
        TextColumn("{task.description:>8}"),
        BarColumn(12),
        MofNCompleteColumn(),
        TextColumn("epochs  {task.fields[status]}"),
    )
    with Progress(*columns, console=console, disable=options.quiet) as progress:
        total = options.epochs * options.seeds
        tasks = {norm: progress.add_task(norm, total=total, status="") for norm in options.norms}
        for norm, task in tasks.items():
            progress.update(task, status="compiling")
            model = Classifier(norm, options.depth, options.activation, data.classes, options.local_stats)
            programs = train.compiled(model, optimizer, mesh, options.batch_size, data)

            def tick(loss: float, accuracy: float, rate: float, task=task) -> None:
                progress.update(task, status=f"loss {loss:.3f}  accuracy {accuracy:6.1%}  {rate:,.0f} examples/s")

            for seed in range(options.seeds):
                state = programs.init(jax.random.key(seed))
                run = report.Run(norm, seed, before=train.look(programs, state, first))
                runs.append(run)
                for epoch in range(options.epochs):
                    batches = train.train_batches(data, options.batch_size, mesh, seed, epoch)
                    state, point = train.one_epoch(programs, state, data, mesh, batches, tick)
                    run.curve.append(point)
                    keep_runs()
                    progress.advance(task)
                run.after = train.look(programs, state, first)
                keep_runs()
