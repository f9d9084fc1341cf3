"""The life of a norm outside the training step: pure functions on trees of arrays, one job a file."""

from jaxnorm.tools.find import NormLayer, NormTable, find_norms
from jaxnorm.tools.report import Report

__all__ = ["find_norms", "NormLayer", "NormTable", "Report"]
