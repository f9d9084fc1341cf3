"""One small net, [Conv, batch, relu, group, mean, layer, Dense], in Flax with jaxnorm's norms and in torch."""

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxnorm.linen import BatchNorm, GroupNorm, LayerNorm

RNG = np.random.default_rng(0)
BATCHES = RNG.normal(0.3, 1.0, (7, 16, 5, 5, 3)).astype(np.float32)  # two before the import, five after it
TARGETS = RNG.normal(size=(7, 16, 2)).astype(np.float32)
RATE = 0.1


@dataclasses.dataclass(frozen=True)
class Partial:
    """functools.partial that is equal to another of the same arguments: jit compiles once for both."""

    function: Any
    settings: tuple

    def __call__(self, **more):
        return self.function(**dict(self.settings), **more)


class Net(nn.Module):
    """epsilon: of group and layer norm."""

    norm: Any = BatchNorm
    epsilon: float = 1e-6

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Conv(4, (3, 3), padding="VALID", name="conv")(x)
        x = nn.relu(self.norm(use_running_average=not train, name="bn")(x))
        x = GroupNorm(2, epsilon=self.epsilon, name="gn")(x)
        x = LayerNorm(epsilon=self.epsilon, name="ln")(jnp.mean(x, (1, 2)))
        return nn.Dense(2, name="fc")(x)


def net(others, **settings):
    """With these settings of batch norm, and the epsilon of the others."""
    return Net(Partial(BatchNorm, tuple(settings.items())), others)


def blank(model):
    """Its variables as shapes."""
    return jax.eval_shape(model.init, jax.random.key(0), BATCHES[0])


@functools.partial(jax.jit, static_argnums=0)
def step(model, variables, x, y, rate):
    """One training step, by gradient descent on the mean square."""

    def loss(params):
        out, state = model.apply({**variables, "params": params}, x, train=True, mutable=["batch_stats"])
        return jnp.mean((out - y) ** 2), state

    grads, state = jax.grad(loss, has_aux=True)(variables["params"])
    params = optax.apply_updates(variables["params"], jax.tree.map(lambda g: -rate * g, grads))
    return {"params": params, **state}


def trained(model, variables, rate=RATE):
    """After the last five batches."""
    for x, y in zip(BATCHES[2:], TARGETS[2:], strict=True):
        variables = step(model, variables, x, y, np.float32(rate))
    return variables


@functools.partial(jax.jit, static_argnums=0)
def evaluated(model, variables):
    """Its outputs in evaluation."""
    return model.apply(variables, BATCHES[0])


def close(actual, expected, rtol=1e-5, atol=1e-5):
    np.testing.assert_allclose(np.asarray(actual), np.asarray(expected), rtol=rtol, atol=atol)


def torch_net(momentum=0.1, epsilon=1e-5):
    torch = pytest.importorskip("torch", reason="torch is not installed")
    tnn = torch.nn

    class Net(tnn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn = tnn.Conv2d(3, 4, 3), tnn.BatchNorm2d(4, epsilon, momentum)
            self.gn, self.ln, self.fc = tnn.GroupNorm(2, 4), tnn.LayerNorm(4), tnn.Linear(4, 2)

        def forward(self, x):
            x = self.gn(torch.relu(self.bn(self.conv(x))))
            return self.fc(self.ln(x.mean((2, 3))))

    torch.manual_seed(0)
    model = Net()
    with torch.no_grad():
        for value in model.parameters():
            value.add_(0.1 * torch.randn_like(value))
    torch_steps(model, BATCHES[:2], TARGETS[:2])
    return model


def torch_steps(model, xs, ys):
    import torch

    model.train()
    optimizer = torch.optim.SGD(model.parameters(), RATE)
    for x, y in zip(xs, ys, strict=True):
        optimizer.zero_grad()
        torch.mean((model(torch.tensor(x.transpose(0, 3, 1, 2))) - torch.tensor(y)) ** 2).backward()
        optimizer.step()


def torch_evaluated(model):
    import torch

    with torch.no_grad():
        return model.eval()(torch.tensor(BATCHES[0].transpose(0, 3, 1, 2))).numpy()
