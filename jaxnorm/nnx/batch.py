"""The family of batch norm, as flax.nnx modules: see jaxnorm.nnx."""

from dataclasses import KW_ONLY, InitVar, dataclass

from flax import nnx

from jaxnorm.family import batch
from jaxnorm.modules import naming
from jaxnorm.nnx.host import Holder, Host, RunningHost, Switch, with_kernels


@dataclass(eq=False, repr=False)
class GhostBatchNorm(batch.GhostBatch, RunningHost):
    """Ghost batch norm: the batch in parts, each normalized on its own, on any number of devices.

        y = (x - mean) / sqrt(var + epsilon) * scale + bias,   mean and var of every ghost

    Variables: Param scale, bias; BatchStat mean, var, and num_updates where `debias` or `momentum=None` asks for it.

    Args:
        num_ghosts: into how many parts the examples are cut, the first dimension.
        layout, over, ...: see jaxnorm.nnx.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> from jaxnorm.nnx import GhostBatchNorm
        >>> x = jnp.array([[1.0], [3.0], [10.0], [30.0]])
        >>> norm = GhostBatchNorm(1, num_ghosts=2, momentum=0.0, epsilon=0.0, rngs=nnx.Rngs(0))
        >>> y = norm(x)
        >>> y[:, 0].tolist(), norm.mean[...].tolist()
        ([-1.0, 1.0, -1.0, 1.0], [11.0])

    Source: Hoffer, Hubara, Soudry 2017, "Train longer, generalize better", algorithm 1.
    """


@dataclass(eq=False, repr=False)
class BatchRenorm(batch.Renorm, RunningHost):
    """Batch renormalization: training sees what evaluation will, within limits. For small or uneven batches.

        y = ((x - mean) / s * r + d) * scale + bias,   s = sqrt(var + epsilon)
        r = clip(s / s', 1 / r_max, r_max),   d = clip((mean - mean') / s', -d_max, d_max),   s', mean' running

    Variables: Param scale, bias; BatchStat mean, var, num_updates, the last not where both limits are numbers.

    Args:
        r_max, d_max: the limits: numbers, or functions of num_updates (an optax schedule is one). None is the paper's
            schedule, batch norm until update 5000.
        layout, over, ...: see jaxnorm.nnx.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> from jaxnorm.nnx import BatchRenorm
        >>> x = jnp.array([[1.0], [3.0]])
        >>> y = BatchRenorm(1, r_max=3.0, d_max=5.0, epsilon=0.0, rngs=nnx.Rngs(0))(x)
        >>> y[:, 0].tolist()
        [1.0, 3.0]

    Source: Ioffe 2017, "Batch Renormalization", algorithm 1 and section 4 (the schedule).
    """


@dataclass(eq=False, repr=False)
class SplitBatchNorm(batch.SplitBatch, RunningHost):
    """Batch norm with several sets of running statistics under one scale and bias.

        y = (x - mean) / sqrt(var + epsilon) * scale + bias,   running[which] = update(running[which])

    Variables: Param scale, bias; BatchStat mean, var, along the sets first, and num_updates where `debias` or
        `momentum=None` asks for it.

    Args:
        sets: their names. A call says `which`, by name or by index, and may trace the index.
        layout, over, ...: see jaxnorm.nnx.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> from jaxnorm.nnx import SplitBatchNorm
        >>> x = jnp.array([[1.0], [3.0]])
        >>> norm = SplitBatchNorm(1, momentum=0.5, rngs=nnx.Rngs(0))
        >>> y = norm(x, "clean")
        >>> norm.mean[...].tolist()
        [[1.0], [0.0]]

    Source: Xie et al. 2020, "Adversarial Examples Improve Image Recognition", section 4.
    """


@dataclass(eq=False, repr=False)
class FrozenBatchNorm(batch.FrozenBatch, Host):
    """Frozen batch norm: a fixed scale and shift, of which nothing is trained.

        y = (x - mean) / sqrt(var + epsilon) * scale + bias,   a gradient for x alone

    Variables: Param scale, bias; BatchStat mean, var, those of BatchNorm, whose checkpoint it takes.

    Args:
        momentum, debias, unbiased, use_running_average: do nothing here. layout, over, ...: see jaxnorm.nnx.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> from jaxnorm.nnx import FrozenBatchNorm
        >>> x = jnp.array([[1.0], [3.0]])
        >>> y = FrozenBatchNorm(1, epsilon=0.0, rngs=nnx.Rngs(0))(x)
        >>> y[:, 0].tolist()
        [1.0, 3.0]

    Source: He et al. 2017, "Mask R-CNN", whose detectors freeze the backbone's.
    """


@dataclass(eq=False, repr=False)
class StreamingNorm(batch.Streaming, RunningHost):
    """Streaming norm: update the running statistics, then normalize with them, in training as in evaluation.

        running = update(running, moments(x)),   y = (x - running.mean) / sqrt(running.var + epsilon) * scale + bias

    Variables: Param scale, bias; BatchStat mean, var, num_updates, the last not with `debias=False`.

    Args:
        debias: True here: the first y is that of batch norm.
        layout, over, ...: see jaxnorm.nnx.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> from jaxnorm.nnx import StreamingNorm
        >>> x = jnp.array([[1.0], [3.0]])
        >>> norm = StreamingNorm(1, momentum=0.5, epsilon=0.0, rngs=nnx.Rngs(0))
        >>> y = norm(x)
        >>> y[:, 0].tolist(), norm.mean[...].tolist()
        ([-1.0, 1.0], [2.0])

    Source: Liao, Kawaguchi, Poggio 2016, "Streaming Normalization", section 4.
    """


@dataclass(eq=False, repr=False)
class VirtualBatchNorm(batch.VirtualBatch, Host):
    """Virtual batch norm: every example as if it had been added, alone, to one fixed reference batch.

        y = (x - mean) / sqrt(var + epsilon) * scale + bias,   (mean, var) of merge(reference, moments of the example)

    The call takes the Moments of the reference batch at this layer, which a network gets by running the reference batch
    alongside.

    Variables: Param scale, bias.

    Args:
        layout, over, ...: see jaxnorm.nnx.

    Example:
        >>> import jax.numpy as jnp, jaxnorm as jn
        >>> from flax import nnx
        >>> from jaxnorm.nnx import VirtualBatchNorm
        >>> x = jnp.array([[5.0], [-1.0]])
        >>> reference = jn.moments(jnp.array([[1.0], [3.0]]), "n c", "n")
        >>> y = VirtualBatchNorm(1, epsilon=0.0, rngs=nnx.Rngs(0))(x, reference)
        >>> print((1000 * y[:, 0]).round())
        [ 1225. -1225.]

    Source: Salimans et al. 2016, "Improved Techniques for Training GANs", section 3.4.
    """


@dataclass(eq=False, repr=False)
class SwitchableNorm(batch.Switchable, RunningHost):
    """Switchable norm: learns how much of instance, layer and batch norm.

        mean = sum(softmax(mean_logits) means),   var = sum(softmax(var_logits) vars),   of instance, layer, batch
        y = (x - mean) / sqrt(var + epsilon) * scale + bias

    Variables: Param scale, bias, mean_logits, var_logits; BatchStat mean, var, and num_updates where `debias` or
        `momentum=None` asks for it.

    Args:
        logits_init: of both, three numbers each.
        layout, over, ...: see jaxnorm.nnx.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> from jaxnorm.nnx import SwitchableNorm
        >>> x = jnp.array([[[1.0], [3.0]], [[0.0], [8.0]]])
        >>> norm = SwitchableNorm(1, epsilon=0.0, momentum=0.0, rngs=nnx.Rngs(0))
        >>> y = norm(x)
        >>> print((1000 * y[:, :, 0]).round(), norm.mean[...])
        [[-681. 341.]
         [-986. 1165.]] [3.]

    Source: Luo et al. 2019, "Differentiable Learning-to-Normalize via Switchable Normalization", equations 3 to 5.
    """


@dataclass(eq=False, repr=False)
class BatchChannelNorm(batch.BatchChannel, RunningHost):
    """Batch-channel norm (BCN): batch norm, and group norm of what it gives, which keeps every channel alive.

        y = group_norm(batch_norm(x) * scale + bias) * channel_scale + channel_bias

    Variables: Param scale, bias, channel_scale, channel_bias; BatchStat mean, var, and num_updates where `debias` or
        `momentum=None` asks for it.

    Args:
        num_groups: of the group norm; it must divide the channels.
        layout, over, ...: see jaxnorm.nnx.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> from jaxnorm.nnx import BatchChannelNorm
        >>> x = jnp.array([[1.0, 5.0], [3.0, 1.0]])
        >>> norm = BatchChannelNorm(2, num_groups=1, epsilon=1e-12, momentum=0.0, rngs=nnx.Rngs(0))
        >>> y = norm(x)
        >>> print(y.round(3), norm.mean[...])
        [[-1. 1.]
         [ 1. -1.]] [2. 3.]

    Source: Qiao et al. 2019, "Rethinking Normalization and Elimination Singularity in Neural Networks", section 4.
    """


@dataclass(eq=False, repr=False)
class DecorrelatedBatchNorm(batch.DecorrelatedBatch, RunningHost):
    """Decorrelated batch norm (DBN): ZCA whitening of groups of channels.

        y = W (x - mean) * scale + bias,   W = (cov + epsilon I)^(-1/2) for each group of consecutive channels

    Variables: Param scale, bias; BatchStat mean, cov, num_updates.

    Args:
        group_size: how many consecutive channels are whitened together; it must divide their number.
        layout, over, ...: see jaxnorm.nnx.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> from jaxnorm.nnx import DecorrelatedBatchNorm
        >>> x = jnp.array([[2.0, 1.0], [-2.0, -1.0], [1.0, -1.0], [-1.0, 1.0]])
        >>> y = DecorrelatedBatchNorm(2, group_size=2, epsilon=0.0, rngs=nnx.Rngs(0))(x)
        >>> print(abs(y.T @ y / 4).round(5))
        [[1. 0.]
         [0. 1.]]

    Source: Huang et al. 2018, "Decorrelated Batch Normalization", algorithm 1.
    """


@dataclass(eq=False, repr=False)
class IterativeNorm(batch.Iterative, RunningHost):
    """Iterative normalization (IterNorm): whitening by Newton's iteration, of matrix products alone.

        y = P_T (x - mean) / sqrt(trace S) * scale + bias,   S = cov + epsilon I
        P_0 = I,   P_k+1 = (3 P_k - P_k^3 S / trace S) / 2

    Variables: Param scale, bias; BatchStat mean, cov, num_updates.

    Args:
        group_size: how many consecutive channels are whitened together; it must divide their number.
        num_iterations: T; few whiten the strong directions only, which is milder.
        layout, over, ...: see jaxnorm.nnx.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> from jaxnorm.nnx import IterativeNorm
        >>> x = jnp.array([[2.0, 1.0], [-2.0, -1.0], [1.0, -1.0], [-1.0, 1.0]])
        >>> y = IterativeNorm(2, group_size=2, num_iterations=12, epsilon=0.0, rngs=nnx.Rngs(0))(x)
        >>> print(abs(y.T @ y / 4).round(5))
        [[1. 0.]
         [0. 1.]]

    Source: Huang et al. 2019, "Iterative Normalization: Beyond Standardization towards Efficient Whitening", algorithm
        1.
    """


@dataclass(eq=False, repr=False)
class CrossIterationBatchNorm(batch.CrossIteration, Switch, Holder):
    """Cross-iteration batch norm (CBN): of a layer, for small batches, with the statistics of its last steps too.

        z = layer(x),   mean_t(kernel) = mean_t + sum(d mean_t / d kernel (kernel - kernel_t)),   E[z^2] likewise
        mean, var of the last steps so moved,   y = (z - mean) / sqrt(var + epsilon) * scale + bias

    Evaluation is that of batch norm: running statistics are kept beside the history.

    Variables: Param scale, bias, and the layer's; BatchStat mean, var, num_updates, and the history, past_*.

    Args:
        layer: a Linear or a Conv with use_bias=False, the channels last.
        window: how many steps are averaged, this one among them.
        layout, over, ...: of z; see jaxnorm.nnx.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> from jaxnorm.nnx import CrossIterationBatchNorm
        >>> rngs = nnx.Rngs(0)
        >>> dense = nnx.Linear(1, 1, use_bias=False, kernel_init=nnx.initializers.constant(2.0), rngs=rngs)
        >>> norm = CrossIterationBatchNorm(dense, epsilon=0.0, momentum=0.5, rngs=rngs)
        >>> y = norm(jnp.array([[1.0], [3.0]]))
        >>> y[:, 0].tolist(), norm.mean[...].tolist(), norm.past_mean[0].tolist()
        ([-1.0, 1.0], [2.0], [4.0])

    Source: Yao et al. 2021, "Cross-Iteration Batch Normalization", equations 6 to 11.
    """

    layer: nnx.Module
    _: KW_ONLY
    rngs: InitVar[nnx.Rngs]

    def __post_init__(self, rngs: nnx.Rngs):
        apply, kernel = self._linear()
        self._build(kernel.shape[-1], rngs, apply, kernel)

    def _linear(self):
        with naming(self):
            kernel = batch.only_kernel(nnx.to_pure_dict(nnx.state(self.layer, nnx.Param)))
        return (lambda kernel, x: with_kernels(self.layer, {("kernel",): kernel})(x)), kernel

    def __call__(
        self, x, use_running_average: bool | None = None, *, mask=None, weights=None, scale=None, bias=None,
        features=None,
    ):  # fmt: skip
        """As the others', of z = layer(x), to which `mask` and `weights` belong."""
        return self._run(
            x, *self._linear(), use_running_average=use_running_average, mask=mask, weights=weights, scale=scale,
            bias=bias, features=features,
        )  # fmt: skip
