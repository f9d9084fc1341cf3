"""The family of batch norm, as flax.linen modules: see jaxnorm.linen."""

import flax.linen as nn

from jaxnorm.family import batch
from jaxnorm.linen.host import Host, RunningHost
from jaxnorm.modules import naming


class GhostBatchNorm(batch.GhostBatch, RunningHost):
    """Ghost batch norm: the batch in parts, each normalized on its own, on any number of devices.

        y = (x - mean) / sqrt(var + epsilon) * scale + bias,   mean and var of every ghost

    Variables: params/{scale, bias}, batch_stats/{mean, var}, and num_updates where `debias` or `momentum=None` asks for
        it.

    Args:
        num_ghosts: into how many parts the examples are cut, the first dimension.
        layout, over, ...: see jaxnorm.linen.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from jaxnorm.linen import GhostBatchNorm
        >>> x = jnp.array([[1.0], [3.0], [10.0], [30.0]])
        >>> norm = GhostBatchNorm(num_ghosts=2, momentum=0.0, epsilon=0.0, use_running_average=False)
        >>> variables = norm.init(jax.random.key(0), x)
        >>> y, state = norm.apply(variables, x, mutable="batch_stats")
        >>> y[:, 0].tolist(), state["batch_stats"]["mean"].tolist()
        ([-1.0, 1.0, -1.0, 1.0], [11.0])

    Source: Hoffer, Hubara, Soudry 2017, "Train longer, generalize better", algorithm 1.
    """


class BatchRenorm(batch.Renorm, RunningHost):
    """Batch renormalization: training sees what evaluation will, within limits. For small or uneven batches.

        y = ((x - mean) / s * r + d) * scale + bias,   s = sqrt(var + epsilon)
        r = clip(s / s', 1 / r_max, r_max),   d = clip((mean - mean') / s', -d_max, d_max),   s', mean' running

    Variables: params/{scale, bias}, batch_stats/{mean, var, num_updates}, the last not where both limits are numbers.

    Args:
        r_max, d_max: the limits: numbers, or functions of num_updates (an optax schedule is one). None is the paper's
            schedule, batch norm until update 5000.
        layout, over, ...: see jaxnorm.linen.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from jaxnorm.linen import BatchRenorm
        >>> x = jnp.array([[1.0], [3.0]])
        >>> norm = BatchRenorm(r_max=3.0, d_max=5.0, epsilon=0.0, use_running_average=False)
        >>> variables = norm.init(jax.random.key(0), x)
        >>> y, _ = norm.apply(variables, x, mutable="batch_stats")
        >>> y[:, 0].tolist()
        [1.0, 3.0]

    Source: Ioffe 2017, "Batch Renormalization", algorithm 1 and section 4 (the schedule).
    """


class SplitBatchNorm(batch.SplitBatch, RunningHost):
    """Batch norm with several sets of running statistics under one scale and bias.

        y = (x - mean) / sqrt(var + epsilon) * scale + bias,   running[which] = update(running[which])

    Variables: params/{scale, bias}, batch_stats/{mean, var}, along the sets first, and num_updates where `debias` or
        `momentum=None` asks for it.

    Args:
        sets: their names. A call says `which`, by name or by index, and may trace the index.
        layout, over, ...: see jaxnorm.linen.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from jaxnorm.linen import SplitBatchNorm
        >>> x = jnp.array([[1.0], [3.0]])
        >>> norm = SplitBatchNorm(momentum=0.5, use_running_average=False)
        >>> variables = norm.init(jax.random.key(0), x, "clean")
        >>> y, state = norm.apply(variables, x, "clean", mutable="batch_stats")
        >>> state["batch_stats"]["mean"].tolist()
        [[1.0], [0.0]]

    Source: Xie et al. 2020, "Adversarial Examples Improve Image Recognition", section 4.
    """


class FrozenBatchNorm(batch.FrozenBatch, Host):
    """Frozen batch norm: a fixed scale and shift, of which nothing is trained.

        y = (x - mean) / sqrt(var + epsilon) * scale + bias,   a gradient for x alone

    Variables: params/{scale, bias}, batch_stats/{mean, var}, those of BatchNorm, whose checkpoint it takes.

    Args:
        momentum, debias, unbiased, use_running_average: do nothing here. layout, over, ...: see jaxnorm.linen.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from jaxnorm.linen import FrozenBatchNorm
        >>> x = jnp.array([[1.0], [3.0]])
        >>> norm = FrozenBatchNorm(epsilon=0.0)
        >>> y, _ = norm.init_with_output(jax.random.key(0), x)
        >>> y[:, 0].tolist()
        [1.0, 3.0]

    Source: He et al. 2017, "Mask R-CNN", whose detectors freeze the backbone's.
    """


class StreamingNorm(batch.Streaming, RunningHost):
    """Streaming norm: update the running statistics, then normalize with them, in training as in evaluation.

        running = update(running, moments(x)),   y = (x - running.mean) / sqrt(running.var + epsilon) * scale + bias

    Variables: params/{scale, bias}, batch_stats/{mean, var, num_updates}, the last not with `debias=False`.

    Args:
        debias: True here: the first y is that of batch norm.
        layout, over, ...: see jaxnorm.linen.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from jaxnorm.linen import StreamingNorm
        >>> x = jnp.array([[1.0], [3.0]])
        >>> norm = StreamingNorm(momentum=0.5, epsilon=0.0, use_running_average=False)
        >>> variables = norm.init(jax.random.key(0), x)
        >>> y, state = norm.apply(variables, x, mutable="batch_stats")
        >>> y[:, 0].tolist(), state["batch_stats"]["mean"].tolist()
        ([-1.0, 1.0], [2.0])

    Source: Liao, Kawaguchi, Poggio 2016, "Streaming Normalization", section 4.
    """


class VirtualBatchNorm(batch.VirtualBatch, Host):
    """Virtual batch norm: every example as if it had been added, alone, to one fixed reference batch.

        y = (x - mean) / sqrt(var + epsilon) * scale + bias,   (mean, var) of merge(reference, moments of the example)

    The call takes the Moments of the reference batch at this layer, which a network gets by running the reference batch
    alongside.

    Variables: params/{scale, bias}.

    Args:
        layout, over, ...: see jaxnorm.linen.

    Example:
        >>> import jax, jax.numpy as jnp, jaxnorm as jn
        >>> from jaxnorm.linen import VirtualBatchNorm
        >>> x = jnp.array([[5.0], [-1.0]])
        >>> reference = jn.moments(jnp.array([[1.0], [3.0]]), "n c", "n")
        >>> norm = VirtualBatchNorm(epsilon=0.0)
        >>> y, _ = norm.init_with_output(jax.random.key(0), x, reference)
        >>> print((1000 * y[:, 0]).round())
        [ 1225. -1225.]

    Source: Salimans et al. 2016, "Improved Techniques for Training GANs", section 3.4.
    """


class SwitchableNorm(batch.Switchable, RunningHost):
    """Switchable norm: learns how much of instance, layer and batch norm.

        mean = sum(softmax(mean_logits) means),   var = sum(softmax(var_logits) vars),   of instance, layer, batch
        y = (x - mean) / sqrt(var + epsilon) * scale + bias

    Variables: params/{scale, bias, mean_logits, var_logits}, batch_stats/{mean, var}, and num_updates where `debias` or
        `momentum=None` asks for it.

    Args:
        logits_init: of both, three numbers each.
        layout, over, ...: see jaxnorm.linen.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from jaxnorm.linen import SwitchableNorm
        >>> x = jnp.array([[[1.0], [3.0]], [[0.0], [8.0]]])
        >>> norm = SwitchableNorm(epsilon=0.0, momentum=0.0, use_running_average=False)
        >>> variables = norm.init(jax.random.key(0), x)
        >>> y, state = norm.apply(variables, x, mutable="batch_stats")
        >>> print((1000 * y[:, :, 0]).round(), state["batch_stats"]["mean"])
        [[-681. 341.]
         [-986. 1165.]] [3.]

    Source: Luo et al. 2019, "Differentiable Learning-to-Normalize via Switchable Normalization", equations 3 to 5.
    """


class BatchChannelNorm(batch.BatchChannel, RunningHost):
    """Batch-channel norm (BCN): batch norm, and group norm of what it gives, which keeps every channel alive.

        y = group_norm(batch_norm(x) * scale + bias) * channel_scale + channel_bias

    Variables: params/{scale, bias, channel_scale, channel_bias}, batch_stats/{mean, var}, and num_updates where
        `debias` or `momentum=None` asks for it.

    Args:
        num_groups: of the group norm; it must divide the channels.
        layout, over, ...: see jaxnorm.linen.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from jaxnorm.linen import BatchChannelNorm
        >>> x = jnp.array([[1.0, 5.0], [3.0, 1.0]])
        >>> norm = BatchChannelNorm(num_groups=1, epsilon=1e-12, momentum=0.0, use_running_average=False)
        >>> variables = norm.init(jax.random.key(0), x)
        >>> y, state = norm.apply(variables, x, mutable="batch_stats")
        >>> print(y.round(3), state["batch_stats"]["mean"])
        [[-1. 1.]
         [ 1. -1.]] [2. 3.]

    Source: Qiao et al. 2019, "Rethinking Normalization and Elimination Singularity in Neural Networks", section 4.
    """


class DecorrelatedBatchNorm(batch.DecorrelatedBatch, RunningHost):
    """Decorrelated batch norm (DBN): ZCA whitening of groups of channels.

        y = W (x - mean) * scale + bias,   W = (cov + epsilon I)^(-1/2) for each group of consecutive channels

    Variables: params/{scale, bias}, batch_stats/{mean, cov, num_updates}.

    Args:
        group_size: how many consecutive channels are whitened together; it must divide their number.
        layout, over, ...: see jaxnorm.linen.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from jaxnorm.linen import DecorrelatedBatchNorm
        >>> x = jnp.array([[2.0, 1.0], [-2.0, -1.0], [1.0, -1.0], [-1.0, 1.0]])
        >>> norm = DecorrelatedBatchNorm(group_size=2, epsilon=0.0, use_running_average=False)
        >>> variables = norm.init(jax.random.key(0), x)
        >>> y, _ = norm.apply(variables, x, mutable="batch_stats")
        >>> print(abs(y.T @ y / 4).round(5))
        [[1. 0.]
         [0. 1.]]

    Source: Huang et al. 2018, "Decorrelated Batch Normalization", algorithm 1.
    """


class IterativeNorm(batch.Iterative, RunningHost):
    """Iterative normalization (IterNorm): whitening by Newton's iteration, of matrix products alone.

        y = P_T (x - mean) / sqrt(trace S) * scale + bias,   S = cov + epsilon I
        P_0 = I,   P_k+1 = (3 P_k - P_k^3 S / trace S) / 2

    Variables: params/{scale, bias}, batch_stats/{mean, cov, num_updates}.

    Args:
        group_size: how many consecutive channels are whitened together; it must divide their number.
        num_iterations: T; few whiten the strong directions only, which is milder.
        layout, over, ...: see jaxnorm.linen.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from jaxnorm.linen import IterativeNorm
        >>> x = jnp.array([[2.0, 1.0], [-2.0, -1.0], [1.0, -1.0], [-1.0, 1.0]])
        >>> norm = IterativeNorm(group_size=2, num_iterations=12, epsilon=0.0, use_running_average=False)
        >>> variables = norm.init(jax.random.key(0), x)
        >>> y, _ = norm.apply(variables, x, mutable="batch_stats")
        >>> print(abs(y.T @ y / 4).round(5))
        [[1. 0.]
         [0. 1.]]

    Source: Huang et al. 2019, "Iterative Normalization: Beyond Standardization towards Efficient Whitening", algorithm
        1.
    """


class CrossIterationBatchNorm(batch.CrossIteration, RunningHost):
    """Cross-iteration batch norm (CBN): of a layer, for small batches, with the statistics of its last steps too.

        z = layer(x),   mean_t(kernel) = mean_t + sum(d mean_t / d kernel (kernel - kernel_t)),   E[z^2] likewise
        mean, var of the last steps so moved,   y = (z - mean) / sqrt(var + epsilon) * scale + bias

    Evaluation is that of batch norm: running statistics are kept beside the history.

    Variables: params/{layer, scale, bias}, batch_stats/{mean, var, num_updates} and the history, batch_stats/past_*.

    Args:
        layer: a Dense or a Conv with use_bias=False, the channels last.
        window: how many steps are averaged, this one among them.
        layout, over, ...: of z; see jaxnorm.linen.

    Example:
        >>> import jax, jax.numpy as jnp, flax.linen as nn
        >>> from jaxnorm.linen import CrossIterationBatchNorm
        >>> dense = nn.Dense(1, use_bias=False, kernel_init=nn.initializers.constant(2.0))
        >>> norm = CrossIterationBatchNorm(dense, epsilon=0.0, momentum=0.5, use_running_average=False)
        >>> x = jnp.array([[1.0], [3.0]])
        >>> y, state = norm.apply(norm.init(jax.random.key(0), x), x, mutable="batch_stats")
        >>> y[:, 0].tolist(), state["batch_stats"]["mean"].tolist(), state["batch_stats"]["past_mean"][0].tolist()
        ([-1.0, 1.0], [2.0], [4.0])

    Source: Yao et al. 2021, "Cross-Iteration Batch Normalization", equations 6 to 11.
    """

    layer: nn.Module

    @nn.compact
    def __call__(
        self, x, use_running_average: bool | None = None, *, mask=None, weights=None, scale=None, bias=None,
        features=None,
    ):  # fmt: skip
        """As RunningHost's, of z = layer(x), to which `mask` and `weights` belong."""
        if self.is_initializing():
            self.layer(x)  # makes its kernel
        layer = self.layer.clone(parent=None)
        with naming(self, self.path):
            kernel = batch.only_kernel(nn.meta.unbox(self.layer.variables.get("params", {})))
        return self._run(
            x, lambda kernel, x: layer.apply({"params": {"kernel": kernel}}, x), kernel,
            use_running_average=use_running_average, mask=mask, weights=weights, scale=scale, bias=bias,
            features=features,
        )  # fmt: skip
