"""Seeing: what the norms of a model do, and what is wrong with them. Reports and pictures."""

from jaxnorm.inspect.cube import plot_cube
from jaxnorm.inspect.plot import plot
from jaxnorm.inspect.plots import plot_depth, plot_drift, plot_statistics
from jaxnorm.inspect.report import Health, report
from jaxnorm.inspect.watch import Watched, watch

__all__ = ["report", "watch", "plot", "plot_cube", "plot_statistics", "plot_drift", "plot_depth", "Health", "Watched"]
