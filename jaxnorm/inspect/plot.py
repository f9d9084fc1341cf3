"""All pictures under one name."""

from typing import Any

from jaxnorm.errors import ArgumentError, named, nearest
from jaxnorm.inspect.cube import plot_cube
from jaxnorm.inspect.plots import plot_depth, plot_drift, plot_statistics

PICTURES = {"cube": plot_cube, "statistics": plot_statistics, "drift": plot_drift, "depth": plot_depth}


@named
def plot(picture: str, *args: Any, **kwargs: Any) -> Any:
    """One of the pictures, by its name.

        plot("cube", ...) = plot_cube(...), and so on

    Args:
        picture: "cube", which entries share a mean and a variance; "statistics", what the norms of a model hold;
            "drift", how that changed in training; "depth", activations and gradients by depth.
        *args, **kwargs: what `plot_cube`, `plot_statistics`, `plot_drift` or `plot_depth` takes.

    Returns:
        A matplotlib Figure. It is not shown.

    Raises:
        ArgumentError: when there is no such picture; and as the function of that name.

    Example:
        >>> import jaxnorm as jn
        >>> figure = jn.inspect.plot("cube", ["batch", "layer"])
        >>> len(figure.axes)
        2

    Source: Wu and He 2018, figure 2 (the cube).

    Differs from: Flax and torch have none.
    """
    if not isinstance(picture, str) or picture not in PICTURES:
        raise ArgumentError(f"there is no picture {picture!r}.{nearest(str(picture), PICTURES)} {', '.join(PICTURES)}.")
    return PICTURES[picture](*args, **kwargs)
