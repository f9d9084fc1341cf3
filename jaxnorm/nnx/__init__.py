"""Every norm of `jaxnorm.norms()` as a flax.nnx module.

**The five of Flax**: change the import, keep the model and its checkpoints.

    from jaxnorm.nnx import BatchNorm  # was: from flax.nnx import BatchNorm

Every argument, variable, initialiser and dtype is Flax's. Where the numbers differ Flax is wrong (masks across devices,
large means, fully masked batches, running statistics read in half precision), and each class says where. Two of Flax's
arguments do less here. `use_fast_variance` does nothing: the stable way costs the same here in collectives, and
less in memory and, with a backward pass, in time (`jaxnorm bench`). `promote_dtype` left alone decides the dtype
of y and casts nothing else; your own is called as Flax calls it, but stored statistics stay as they are.

Added to all of them, keyword-only:
    layout: names of the dimensions of x, "n h w c", in place of Flax's numbers.
    over: the axes averaged together, mapped axes of the devices among them; `name?` for one that may be absent.
    features: the axes of scale and bias, which have num_features entries in all.
    sizes: sizes of the axes that compose a dimension of the layout, {"m": 4} for "(m n) h w c".
and to their call:
    weights: how much an element counts, not negative, broadcastable to x.
    scale, bias, features: in the place of parameters, laid out by name. So every norm is conditional:
        norm = LayerNorm(8, layout="n t c", over="c", use_scale=False, use_bias=False, rngs=rngs)
        norm(x, scale=s, bias=b, features="n c")

**All others** are functions of `jaxnorm` as modules: `num_features`, then keyword-only rngs and the arguments of the
function as settings:
    layout, over, features, sizes: as in the function, `over` with mapped axes of the devices.
    epsilon, momentum, debias, unbiased: as in the function.
    use_scale, use_bias, scale_init, bias_init: of the parameters, where the norm has them. They are kept flat.
    use_running_average: normalize with the running statistics and change nothing. Here, in the call, by `eval()` or a
        view; False by default.
    param_dtype: of the parameters. State is float32.
    dtype: of y, which is rounded to it once; None for the dtype of x.
Norms of weights go around a module. The BatchStat num_updates is there only where it matters.

`y, seen = nnx.capture(model, jaxnorm.nnx.BatchMoments)(x)` also gives the Moments of what every norm with a running
mean and variance sees, in training and in evaluation: see `jaxnorm.tools.recalibrate`.
"""

from jaxnorm.nnx.basic import BatchNorm, GroupNorm, InstanceNorm, LayerNorm, RMSNorm
from jaxnorm.nnx.batch import (
    BatchChannelNorm,
    BatchRenorm,
    CrossIterationBatchNorm,
    DecorrelatedBatchNorm,
    FrozenBatchNorm,
    GhostBatchNorm,
    IterativeNorm,
    SplitBatchNorm,
    StreamingNorm,
    SwitchableNorm,
    VirtualBatchNorm,
)
from jaxnorm.nnx.conditional import SPADE, AdaptiveInstanceNorm, AdaptiveLayerNorm, ConditionalBatchNorm, FiLM
from jaxnorm.nnx.host import BatchMoments as BatchMoments
from jaxnorm.nnx.layer import (
    AddNorm,
    GatedRMSNorm,
    L2Norm,
    PartialRMSNorm,
    PositionalNorm,
    QKNorm,
    ScaleNorm,
)
from jaxnorm.nnx.response import (
    DynamicErf,
    DynamicTanh,
    EvoNormB0,
    EvoNormS0,
    FilterResponseNorm,
    GlobalResponseNorm,
    LocalResponseNorm,
)
from jaxnorm.nnx.stored import use_stored_stats as use_stored_stats
from jaxnorm.nnx.weights import ScaledWeightStandardization, SpectralNorm, WeightNorm, WeightStandardization

__all__ = [
    "BatchNorm", "LayerNorm", "RMSNorm", "InstanceNorm", "GroupNorm",
    "GhostBatchNorm", "BatchRenorm", "SplitBatchNorm", "FrozenBatchNorm", "StreamingNorm", "CrossIterationBatchNorm",
    "VirtualBatchNorm", "AdaptiveInstanceNorm", "AdaptiveLayerNorm", "FiLM", "ConditionalBatchNorm", "SPADE",
    "PartialRMSNorm", "ScaleNorm", "L2Norm", "QKNorm", "GatedRMSNorm", "AddNorm", "PositionalNorm",
    "DynamicTanh", "DynamicErf", "GlobalResponseNorm", "FilterResponseNorm", "LocalResponseNorm",
    "EvoNormB0", "EvoNormS0", "SwitchableNorm", "BatchChannelNorm", "DecorrelatedBatchNorm", "IterativeNorm",
    "WeightNorm", "WeightStandardization", "ScaledWeightStandardization", "SpectralNorm",
]  # fmt: skip
