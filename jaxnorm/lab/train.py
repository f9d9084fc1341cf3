"""Data-parallel training with explicit state: pure functions of (state, batch), mapped over the mesh axis "devices"."""

import functools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxnorm as jn
from jaxnorm.lab import processes
from jaxnorm.lab.data import Dataset
from jaxnorm.lab.model import Classifier

DEVICES = "devices"
EACH = P(DEVICES)  # one part, or one row, a device
SAME = P()  # the same on every device


class State(NamedTuple):
    """What a step takes and gives back, the same on every device. Only local statistics differ: one row a device."""

    params: Any
    stats: Any  # the running statistics, {} where the norm has none
    opt_state: Any


class Seen(NamedTuple):
    """What a step saw of the whole batch."""

    loss: Any  # the mean
    correct: Any  # how many
    gradient_norms: Any  # (depth,): of d loss / d weights, one for each convolution
    pre_activations: Any  # depth times (n, h, w, c): what goes into the activations


class Scored(NamedTuple):
    """Sums over examples that were not trained on."""

    loss: Any
    correct: Any
    count: Any


@dataclass(frozen=True)
class Epoch:
    """One point of the curves: means over the training examples as they were met, and over the test split after."""

    loss: float
    accuracy: float
    test_loss: float
    test_accuracy: float
    test_count: int
    seconds: float  # of the training alone
    examples_per_second: float


QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


@dataclass(frozen=True)
class Look:
    """Inside the net on one batch, by depth."""

    gradient_norms: list[float]  # of d loss / d weights of each convolution
    quantiles: list[list[float]]  # QUANTILES of what goes into each activation


@dataclass(frozen=True)
class Programs:
    """The functions of one net on one mesh."""

    init: Callable[[jax.Array], State]
    step: Callable[..., tuple[State, Seen]]
    evaluate: Callable[..., Scored]


def sgd(learning_rate: float, steps: int) -> optax.GradientTransformation:
    """SGD with momentum 0.9. The rate falls to 0 along a cosine, so that in the end the running statistics fit."""
    cosine = optax.cosine_decay_schedule(learning_rate, steps)
    return optax.sgd(lambda count: cosine(jnp.asarray(count, jnp.float32)), momentum=0.9)


def init(
    model: Classifier, optimizer: optax.GradientTransformation, shape: tuple[int, ...], devices: int, key: jax.Array
) -> State:
    """The state before the first step, for pictures of one shape (h, w, c)."""
    variables = model.init(key, jnp.zeros((1, *shape)), train=False)
    params, stats = variables["params"], variables.get("batch_stats", {})
    if model.local:
        stats = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (devices, *leaf.shape)), stats)
    return State(params, stats, optimizer.init(params))


def step(model: Classifier, optimizer: optax.GradientTransformation, state: State, x, y) -> tuple[State, Seen]:
    """One update, on one device of many: x and y are its part of the batch."""
    stats = jax.tree.map(lambda rows: rows[0], state.stats) if model.local else state.stats

    def loss(params):
        # Summed over all devices before it is divided by the size of the whole batch: the loss is that of the whole
        # batch, on every device. So is its gradient: shard_map (check_vma=True) sums the gradients of replicated
        # parameters, and summing them again would be wrong.
        variables = {"params": params, "batch_stats": stats}
        logits, changed = model.apply(variables, x, train=True, mutable=["batch_stats", "intermediates"])
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, y)
        total, correct = jax.lax.psum((losses.sum(), (logits.argmax(-1) == y).sum()), DEVICES)
        return total / (len(y) * jax.lax.axis_size(DEVICES)), (correct, changed)

    (mean, (correct, changed)), grads = jax.value_and_grad(loss, has_aux=True)(state.params)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    stats = changed.get("batch_stats", {})
    stats = jax.tree.map(lambda leaf: leaf[None], stats) if model.local else stats
    norms = jnp.stack([optax.tree.norm(grads[f"conv_{i}"]["kernel"]) for i in range(model.depth)])
    sown = tuple(changed["intermediates"][f"pre_activation_{i}"][0] for i in range(model.depth))
    return State(optax.apply_updates(state.params, updates), stats, opt_state), Seen(mean, correct, norms, sown)


def evaluate(model: Classifier, params, stats, x, y, mask) -> Scored:
    """Sums over the examples that count, with the running statistics; on one device of many."""
    logits: Any = model.apply({"params": params, "batch_stats": stats}, x, train=False)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, y)
    correct = logits.argmax(-1) == y
    return jax.lax.psum(Scored(losses.sum(where=mask), correct.sum(where=mask), mask.sum()), DEVICES)


def pooled(stats: Any) -> Any:
    """Local running statistics, one row a device, as one: all devices have seen the same number of updates."""

    def pool(mean: jax.Array, var: jax.Array) -> dict:
        state = jn.sync_state(jn.RunningStats(mean, var, jnp.ones((), jnp.int32), ("c",)), DEVICES)
        return {"mean": state.mean, "var": state.var}

    rows = {name: jax.vmap(pool, axis_name=DEVICES)(s["mean"], s["var"]) for name, s in stats.items()}
    return jax.tree.map(lambda leaf: leaf[0], rows)


def compiled(
    model: Classifier, optimizer: optax.GradientTransformation, mesh: Mesh, batch_size: int, data: Dataset
) -> Programs:
    """init, step and evaluate for one net; the last two compiled ahead of time: nothing compiles while it trains.

    One call a step, no `lax.scan` over them: inside a loop XLA's CPU convolutions are ten times slower.
    """
    spec = State(SAME, EACH if model.local else SAME, SAME)
    shardings = jax.tree.map(lambda s: NamedSharding(mesh, s), spec)

    def start(key: jax.Array) -> State:
        return processes.put(init(model, optimizer, data.x.shape[1:], mesh.size, key), shardings)

    mapped_step = jax.shard_map(
        functools.partial(step, model, optimizer),
        mesh=mesh,
        in_specs=(spec, EACH, EACH),
        out_specs=(spec, Seen(SAME, SAME, SAME, EACH)),
    )
    mapped_evaluate = jax.shard_map(
        functools.partial(evaluate, model), mesh=mesh, in_specs=(SAME, SAME, EACH, EACH, EACH), out_specs=SAME
    )

    def score(state: State, x, y, mask) -> Scored:
        stats = pooled(state.stats) if model.local else state.stats
        return mapped_evaluate(state.params, stats, x, y, mask)

    state = start(jax.random.key(0))
    return Programs(
        init=start,
        step=jax.jit(mapped_step).lower(state, *first_batch(data, batch_size, mesh)).compile(),
        evaluate=jax.jit(score).lower(state, *next(held_out_batches(data, mesh))).compile(),
    )


def first_batch(data: Dataset, batch_size: int, mesh: Mesh) -> tuple[Any, ...]:
    """x and y of the first training examples."""
    return processes.rows_of(mesh, np.arange(batch_size), data.x, data.y)


def train_batches(data: Dataset, batch_size: int, mesh: Mesh, seed: int, epoch: int) -> Iterator[tuple[Any, ...]]:
    """The training split once, shuffled, in whole batches x and y: what is left over waits for the next epoch."""
    order = np.random.default_rng((seed, epoch)).permutation(len(data.x))
    for start in range(0, len(order) - batch_size + 1, batch_size):
        yield processes.rows_of(mesh, order[start : start + batch_size], data.x, data.y)


def held_out_batches(data: Dataset, mesh: Mesh) -> Iterator[tuple[Any, ...]]:
    """The test split once: x, y and a mask that is False where the last batch is filled up with copies."""
    size = mesh.size * -(-min(len(data.x_test), 1024) // mesh.size)
    for start in range(0, len(data.x_test), size):
        rows = np.arange(start, start + size)
        mask = rows < len(data.x_test)
        rows = np.where(mask, rows, 0)
        yield *processes.rows_of(mesh, rows, data.x_test, data.y_test), *processes.rows_of(mesh, np.arange(size), mask)


def one_epoch(
    programs: Programs,
    state: State,
    data: Dataset,
    mesh: Mesh,
    batches: Iterator[tuple[Any, ...]],
    tick: Callable[[float, float, float], None],
) -> tuple[State, Epoch]:
    """Trains on the batches, then scores the test split. `tick` hears loss, accuracy and examples/s after each step."""
    loss = correct = count = steps = 0
    began = time.perf_counter()
    for x, y in batches:
        state, seen = programs.step(state, x, y)
        loss, correct, count, steps = loss + float(seen.loss), correct + int(seen.correct), count + len(y), steps + 1
        seconds = time.perf_counter() - began
        tick(loss / steps, correct / count, count / seconds)
    parts = [programs.evaluate(state, *batch) for batch in held_out_batches(data, mesh)]
    test = Scored(*(sum(map(float, column)) for column in zip(*parts, strict=True)))
    return state, Epoch(
        loss=loss / steps,
        accuracy=correct / count,
        test_loss=test.loss / test.count,
        test_accuracy=test.correct / test.count,
        test_count=int(test.count),
        seconds=seconds,
        examples_per_second=count / seconds,
    )


def look(programs: Programs, state: State, batch: tuple[Any, ...]) -> Look:
    """Gradients and pre-activations by depth on one batch. The step is taken and thrown away."""
    _, seen = programs.step(state, *batch)
    return Look(
        gradient_norms=seen.gradient_norms.tolist(),
        quantiles=[np.quantile(processes.gathered(rows), QUANTILES).tolist() for rows in seen.pre_activations],
    )
