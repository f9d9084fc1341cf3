"""jaxnorm: normalization over named axes, for JAX and Flax."""

from jaxnorm import inspect, tools
from jaxnorm.errors import AxisError, LayoutError
from jaxnorm.moments import Moments, empty_moments, merge, moments
from jaxnorm.normalize import normalize, standardize
from jaxnorm.normalizer import Normalizer, normalizer
from jaxnorm.norms.basic import batch_norm, group_norm, instance_norm, layer_norm, rms_norm
from jaxnorm.norms.batch import (
    batch_renorm,
    frozen_batch_norm,
    ghost_batch_norm,
    streaming_norm,
    virtual_batch_norm,
)
from jaxnorm.norms.conditional import (
    adaptive_instance_norm,
    adaptive_layer_norm,
    conditional_batch_norm,
    film,
    spade,
)
from jaxnorm.norms.cross_iteration import (
    CrossIterationHistory,
    cross_iteration_batch_norm,
    cross_iteration_history,
)
from jaxnorm.norms.dynamic import dynamic_erf, dynamic_tanh
from jaxnorm.norms.evo import evo_norm_b0, evo_norm_s0
from jaxnorm.norms.layer import (
    add_norm,
    gated_rms_norm,
    l2_norm,
    partial_rms_norm,
    positional_norm,
    qk_norm,
    scale_norm,
)
from jaxnorm.norms.mixed import batch_channel_norm, switchable_norm
from jaxnorm.norms.response import filter_response_norm, global_response_norm, local_response_norm
from jaxnorm.norms.sets import select_stats, split_batch_norm
from jaxnorm.norms.weights import (
    SpectralState,
    map_kernels,
    scaled_weight_standardization,
    spectral_norm,
    spectral_state,
    weight_norm,
    weight_standardization,
)
from jaxnorm.norms.whitening import (
    RunningCovariance,
    decorrelated_batch_norm,
    iterative_norm,
    running_covariance,
)
from jaxnorm.running import RunningStats, running_stats, update
from jaxnorm.sync import reduce_gradients, sync_state
from jaxnorm.table import norms

__version__ = "0.1.0"

__all__ = [
    "batch_norm",
    "layer_norm",
    "rms_norm",
    "instance_norm",
    "group_norm",
    "moments",
    "merge",
    "normalize",
    "standardize",
    "empty_moments",
    "running_stats",
    "update",
    "sync_state",
    "reduce_gradients",
    "norms",
    "tools",
    "inspect",
    "ghost_batch_norm",
    "batch_renorm",
    "split_batch_norm",
    "select_stats",
    "frozen_batch_norm",
    "streaming_norm",
    "cross_iteration_batch_norm",
    "cross_iteration_history",
    "virtual_batch_norm",
    "adaptive_instance_norm",
    "adaptive_layer_norm",
    "film",
    "conditional_batch_norm",
    "spade",
    "partial_rms_norm",
    "scale_norm",
    "l2_norm",
    "qk_norm",
    "gated_rms_norm",
    "add_norm",
    "positional_norm",
    "dynamic_tanh",
    "dynamic_erf",
    "global_response_norm",
    "filter_response_norm",
    "local_response_norm",
    "evo_norm_b0",
    "evo_norm_s0",
    "switchable_norm",
    "batch_channel_norm",
    "decorrelated_batch_norm",
    "iterative_norm",
    "running_covariance",
    "weight_norm",
    "weight_standardization",
    "scaled_weight_standardization",
    "spectral_norm",
    "spectral_state",
    "map_kernels",
    "normalizer",
    "Moments",
    "RunningStats",
    "RunningCovariance",
    "CrossIterationHistory",
    "SpectralState",
    "Normalizer",
    "LayoutError",
    "AxisError",
]
