"""The life of a norm outside the training step: pure functions on trees of arrays, one job a file.

To normalize with stored statistics while the rest trains takes the modules: `use_stored_stats` is in jaxnorm.linen and
in jaxnorm.nnx.
"""

from jaxnorm.tools.convert import Converted, ConvertReport, convert
from jaxnorm.tools.files import read, write
from jaxnorm.tools.find import NormLayer, NormTable, find_norms
from jaxnorm.tools.fold import Folded, fold, fold_pairs, scale_and_shift
from jaxnorm.tools.freeze import freeze_affine, freeze_stats, frozen
from jaxnorm.tools.guard import check_complete, check_moments, check_stats
from jaxnorm.tools.import_file import import_file
from jaxnorm.tools.optimizer import commit_if_finite, ema, norm_mask
from jaxnorm.tools.recalibrate import Recalibrated, recalibrate
from jaxnorm.tools.replicas import Merged, ReplicaReport, check_replicas, merge_replicas, replicate
from jaxnorm.tools.report import Report

__all__ = [
    "find_norms", "NormLayer", "NormTable", "freeze_affine", "freeze_stats", "frozen", "norm_mask",
    "commit_if_finite", "ema", "check_stats", "check_moments", "check_complete", "convert", "Converted",
    "ConvertReport", "import_file", "read", "write", "fold", "fold_pairs",
    "scale_and_shift", "Folded", "recalibrate", "Recalibrated", "merge_replicas", "Merged", "replicate",
    "check_replicas", "ReplicaReport", "Report",
]  # fmt: skip
