"""jaxnorm: normalization over named axes, for JAX and Flax."""

from jaxnorm.errors import AxisError, LayoutError
from jaxnorm.moments import Moments, empty_moments, merge, moments
from jaxnorm.normalize import normalize, standardize
from jaxnorm.norms import batch_norm, group_norm, instance_norm, layer_norm, rms_norm
from jaxnorm.running import RunningStats, running_stats, update
from jaxnorm.sync import reduce_gradients, sync_state

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
    "Moments",
    "RunningStats",
    "LayoutError",
    "AxisError",
]
