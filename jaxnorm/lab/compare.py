"""`jaxnorm compare`: trains one small classifier per norm, shows how it goes, and writes what came out."""

import contextlib
import sys
from typing import Any

import jax
from jax.sharding import AxisType, Mesh

from jaxnorm.lab import data as datasets
from jaxnorm.lab.options import DEVICES, BadOption, Options, need, output_folder


def run(options: Options) -> int:
    """Does what the options say.

    Returns:
        The exit status: 0, or 130 where Ctrl-C cut it short; what there is then is written all the same.

    Raises:
        BadOption: before anything is compiled.
    """
    need("matplotlib", "rich")
    data = datasets.load(options.dataset, options.data)
    if options.batch_size > len(data.x):
        raise BadOption(f"argument --batch-size: {options.batch_size} is more than the {len(data.x)} training examples")
    mesh = mesh_for(options)
    folder = output_folder(options.out, options.dataset)

    from rich.console import Console

    from jaxnorm.lab import plots, report

    console = Console(highlight=False)
    runs: list[report.Run] = []
    interrupted = False
    try:
        train_all(options, mesh, data, runs, console)
    except KeyboardInterrupt:
        interrupted = True
        print("jaxnorm compare: interrupted; writing what there is", file=sys.stderr)
    results = report.document(options, mesh, data, runs, interrupted)
    report.write(folder / "results.json", results)
    pictures = plots.draw(folder, runs)
    if results["table"]:
        console.print(report.table(results["table"]))
    for path in (folder / "results.json", *pictures):
        print(path)
    return 130 if interrupted else 0


def mesh_for(options: Options) -> Mesh:
    """The devices to train on. Starts JAX, with simulated devices where it runs on CPU."""
    check_parts(options.batch_size, options.devices or 1)
    wanted = options.devices or DEVICES
    with contextlib.suppress(RuntimeError):  # JAX was started before: there are as many as there are
        jax.config.update("jax_num_cpu_devices", wanted)
    there = jax.devices()
    if options.devices and wanted > len(there):
        platform = there[0].platform
        advice = "JAX was started before with fewer" if platform == "cpu" else "JAX_PLATFORMS=cpu simulates them"
        raise BadOption(f"argument --devices: {wanted} wanted, {platform} has {len(there)}; {advice}")
    devices = there[:wanted]
    check_parts(options.batch_size, len(devices))
    return jax.make_mesh((len(devices),), ("devices",), axis_types=(AxisType.Auto,), devices=devices)


def check_parts(batch_size: int, devices: int) -> None:
    if batch_size % devices:
        raise BadOption(f"argument --batch-size: {batch_size} is not a multiple of the {devices} devices")


def train_all(options: Options, mesh: Mesh, data: datasets.Dataset, runs: list, console: Any) -> None:
    """Trains every norm from every seed, and puts each run into `runs` as soon as it has begun."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    from jaxnorm.lab import report, train
    from jaxnorm.lab.model import Classifier

    optimizer = train.sgd(options.learning_rate, options.epochs * (len(data.x) // options.batch_size))
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
                run = report.Run(norm, seed, before=train.look(programs, state, data, options.batch_size))
                runs.append(run)
                for epoch in range(options.epochs):
                    batches = train.train_batches(data, options.batch_size, seed, epoch)
                    state, point = train.one_epoch(programs, state, data, mesh, batches, tick)
                    run.curve.append(point)
                    progress.advance(task)
                run.after = train.look(programs, state, data, options.batch_size)
