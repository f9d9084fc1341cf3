"""One training over several processes, usually one a host: who takes part, who reads which rows, and who has died.

JAX ends a process whose peer is gone by abort(), which no Python code can catch, and a collective on CPU may wait for
the dead for ever. So each process trains in a child, and watches it from outside: the parent never starts JAX, is told
after each epoch what there is, and has the last word whatever becomes of the child.
"""

import dataclasses
import multiprocessing
import os
import re
import signal
import sys
import tempfile
import threading
import traceback
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxnorm.lab.options import BadOption, Options

JOIN = 60  # seconds to wait for the others at the start
HEARTBEAT = 30  # seconds without a sign of life until a process counts as dead

SLURM = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID")  # what JAX reads


class Lost(Exception):
    """A peer process is gone or never came, in one line."""


def located(options: Options, environ: Mapping[str, str] = os.environ) -> Options:
    """The options with num_processes and process_id filled in from SLURM's or cloud TPU's variables; 1 and 0 if alone.

    Only inside `srun` is SLURM_STEP_NODELIST set: a batch script or a shell is one process, however many tasks the
    job has. Options given on the command line win.
    """
    given: Any = (options.coordinator, options.num_processes, options.process_id)
    if given != (None, None, None):
        if None in given:
            raise BadOption("arguments --coordinator, --num-processes, --process-id: go together, all three or none")
        _, count, index = given
        if index >= count:
            raise BadOption(f"argument --process-id: must be below the {count} of --num-processes, got {index}")
        return options
    count, index = 1, 0
    hosts = environ.get("TPU_PROCESS_ADDRESSES", environ.get("TPU_WORKER_HOSTNAMES", "")).split(",")
    slices = int(environ.get("MEGASCALE_NUM_SLICES", "1"))
    if all(name in environ for name in SLURM):
        count, index = int(environ.get("SLURM_STEP_NUM_TASKS", environ["SLURM_NTASKS"])), int(environ["SLURM_PROCID"])
    elif len(hosts) * slices > 1:
        count = len(hosts) * slices
        index = int(environ.get("MEGASCALE_SLICE_ID", "0")) * len(hosts) + int(environ.get("TPU_WORKER_ID", "0"))
    return dataclasses.replace(options, num_processes=count, process_id=index)


def meeting_point(options: Options) -> str:
    return options.coordinator or "that SLURM's or cloud TPU's variables name"


def in_child(work: Callable[..., None], options: Options, keep: Callable[[Any], None]) -> None:
    """Does `work(options, keep, join)` in a child process; what it keeps is kept here.

    Raises:
        BadOption: as the work does.
        Lost: when a peer is gone, or the child died of something else, which is then printed.
    """
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    joined = False
    with tempfile.NamedTemporaryFile() as log:
        child = context.Process(target=_child, args=(work, options, sender, log.name, (JOIN, HEARTBEAT)))
        child.start()
        sender.close()  # so that the pipe ends when the child does
        try:
            while True:
                match receiver.recv():
                    case BadOption() as error:
                        raise error
                    case "joined":
                        joined = True
                    case "finished":
                        break
                    case kept:
                        keep(kept)
            child.join()  # until the others have finished too; what becomes of them does not matter any more
        except EOFError:
            child.join()
            raise Lost(_diagnosis(options, joined, Path(log.name).read_text(errors="replace"))) from None
        finally:
            child.kill()


def _diagnosis(options: Options, joined: bool, log: str) -> str:
    """What the child's last words say, as one line."""
    who = f"process {options.process_id} of {options.num_processes}"
    where = meeting_point(options)
    known = re.search(r"JAX distributed service detected.*absl::Status: (.*)|(\w+: Gloo [\w -]+ failed.*)", log)
    if not known:
        print(log, end="", file=sys.stderr)
        return f"{who}: the training failed, or a peer process died or could not be reached; see above"
    reason = (known[1] or known[2]).split(". ")[0].strip(" :")
    if not joined:
        return f"{who}: not all processes met at the coordinator {where} within {JOIN} seconds ({reason})"
    return f"{who}: a peer process died or could not be reached; coordinator {where} ({reason})"


def _child(work: Callable[..., None], options: Options, pipe: Any, log: str, limits: tuple[int, int]) -> None:
    """The child's whole life. It never outlives its parent, leaves Ctrl-C to it, and hides what C++ code prints."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()
    sys.stdout, sys.stderr = (os.fdopen(os.dup(fd), "w", buffering=1) for fd in (1, 2))
    file = os.open(log, os.O_WRONLY | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)

    def join_them() -> None:
        join(options, *limits)
        pipe.send("joined")

    try:
        work(options, pipe.send, join_them)
        pipe.send("finished")
        jax.distributed.shutdown()  # waits for the others: the coordinator must not leave while one still needs it
    except BadOption as error:
        pipe.send(error)
    except BaseException:
        os.write(file, traceback.format_exc().encode())
    os._exit(0)  # without JAX's own waiting for peers that may be gone


def join(options: Options, timeout: int, heartbeat: int) -> None:
    """Meets the other processes. Must come before JAX is started."""
    limits: Any = {"initialization_timeout": timeout, "heartbeat_timeout_seconds": heartbeat}
    try:
        if options.coordinator:
            place = options.coordinator, options.num_processes, options.process_id
            jax.distributed.initialize(*place, cluster_detection_method="deactivate", **limits)
        else:
            jax.distributed.initialize(**limits)
    except (RuntimeError, ValueError) as error:  # such as a port that is taken
        reason = " ".join(str(error).split())
        where = meeting_point(options)
        raise BadOption(f"argument --coordinator: cannot use the coordinator {where}: {reason}") from None


def agree(options: Options, *arrays: np.ndarray) -> None:
    """Raises where the processes were not given the same training: they would wait for one another for ever."""
    own = {"coordinator": None, "process_id": None, "data": None, "out": None, "quiet": None}
    check = zlib.crc32(repr(dataclasses.replace(options, **own)).encode())
    for array in arrays:
        check = zlib.crc32(np.ascontiguousarray(array).data, check)
    try:
        multihost_utils.assert_equal(np.uint32(check))
    except AssertionError:
        raise BadOption("the processes were not all given the same options and data") from None


def rows_of(mesh: Mesh, rows: np.ndarray, *arrays: np.ndarray) -> tuple[Any, ...]:
    """Those rows of the arrays as a batch, split over the devices; each process reads only the rows of its own."""
    if jax.process_count() == 1:
        return tuple(array[rows] for array in arrays)  # the program that is called splits it
    sharding = NamedSharding(mesh, PartitionSpec(mesh.axis_names))

    def batch(array: np.ndarray) -> jax.Array:
        def read(part: Any) -> np.ndarray:
            return array[rows[part[0]]]

        return jax.make_array_from_callback((len(rows), *array.shape[1:]), sharding, read)

    return tuple(batch(array) for array in arrays)


def put(tree: Any, shardings: Any) -> Any:
    """jax.device_put of what every process has the same of, without asking the others whether it is the same."""
    if jax.process_count() == 1:
        return jax.device_put(tree, shardings)

    def put_leaf(leaf: Any, sharding: NamedSharding) -> jax.Array:
        leaf = np.asarray(leaf)
        return jax.make_array_from_callback(leaf.shape, sharding, lambda part: leaf[part])

    return jax.tree.map(lambda s, part: jax.tree.map(lambda leaf: put_leaf(leaf, s), part), shardings, tree)


def gathered(array: jax.Array) -> np.ndarray:
    """All of an array whose parts are on the devices of all processes. Every process must call it."""
    return np.asarray(array if array.is_fully_addressable else multihost_utils.process_allgather(array, tiled=True))
