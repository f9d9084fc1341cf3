"""What a Flax module of each norm beyond the five is, with no flax in it. `jaxnorm.linen` and `jaxnorm.nnx` host it."""
