"""What jaxnorm.tools.fold refuses, and how it says so."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from folding import bn, cast, close, conv, normal
from jax.sharding import PartitionSpec as P

import jaxnorm as jn
from jaxnorm.tools.fold import fold

MESH = jax.sharding.Mesh(np.array(jax.devices()[:1]), "d")


def scanned(p, x):
    def step(carry, _):
        return bn(p["bn"], carry), None

    return jax.lax.scan(step, x @ p["conv"]["kernel"][0], None, 2)[0]


def train(p, x):
    y, _ = jn.batch_norm(conv(p["conv"]["kernel"], x), jn.running_stats(c=3), scale=p["bn"]["scale"])
    return y


def of_another(p, x):
    b = p["bn"]
    return bn({**b, "scale": b["scale"] * p["conv"]["bias"]}, conv(p["conv"]["kernel"], x))


def own_bias_late(p, x):
    return jnp.exp(bn(p["bn"], conv(p["conv"]["kernel"], x)) + p["conv"]["bias"].reshape(1, 1, 3))


def after(kernel, x, p):
    return conv(kernel, bn(p["bn"], jnp.sin(x)))


def with_penalty(p, x):
    return jnp.sin(bn(p["bn"], conv(p["conv"]["kernel"], x))), jnp.sum(p["bn"]["scale"] ** 2)


def through_a_ref(p, x):
    y = conv(p["conv"]["kernel"], x)
    ref = jax.new_ref(jnp.zeros(y.shape))
    ref[...] = y
    return jnp.sin(bn(p["bn"], y)) + ref[...]


def around_a_ref(p, x):
    ref = jax.new_ref(jnp.zeros((3, 3, 3)))
    ref[...] = conv(p["conv"]["kernel"], x)
    return jnp.sin(bn(p["bn"], ref[...]))


ROUNDS = "its input is the output of `convert_element_type`"
COMPUTED = "its input is the output of `conv_general_dilated`, whose kernel is computed, by `"
TURNED = "whose kernel `conv` is reshaped across its axes, or reversed"
REFUSED = {
    "integers between": (lambda p, x: jnp.sin(bn(p["bn"], cast(conv(p["conv"]["kernel"], x), jnp.int32))), ROUNDS),
    "booleans between": (lambda p, x: jnp.sin(bn(p["bn"], cast(conv(p["conv"]["kernel"], x), bool))), ROUNDS),
    "float8 between": (
        lambda p, x: jnp.sin(bn(p["bn"], cast(conv(p["conv"]["kernel"], x), jnp.float8_e5m2))),
        ROUNDS,
    ),
    "integers after": (
        lambda p, x: conv(p["conv"]["kernel"], cast(bn(p["bn"], jnp.sin(x)), jnp.int32)),
        "its output goes to `convert_element_type`: no Dense, no Conv",
    ),
    "less precision between": (
        lambda p, x: jnp.sin(bn(p["bn"], jax.lax.reduce_precision(conv(p["conv"]["kernel"], x), 5, 2))),
        "its input is the output of `reduce_precision`",
    ),
    "integers in the norm": (
        lambda p, x: jnp.sin(
            cast(conv(p["conv"]["kernel"], x) - p["bn"]["mean"].reshape(1, 1, 3), jnp.int32)
            * jax.lax.rsqrt(p["bn"]["var"]).reshape(1, 1, 3)
        ),
        "it is used more than once, with `convert_element_type` between",
    ),
    "integer kernel": (
        lambda p, x: jnp.sin(bn(p["bn"], conv(cast(p["conv"]["kernel"], jnp.int8), x))),
        COMPUTED + "convert_element_type`",
    ),
    "kernel of less precision": (
        lambda p, x: jnp.sin(bn(p["bn"], conv(jax.lax.reduce_precision(p["conv"]["kernel"], 5, 2), x))),
        COMPUTED + "reduce_precision`",
    ),
    "outputs reversed": (lambda p, x: jnp.sin(bn(p["bn"], conv(p["conv"]["kernel"][..., ::-1], x))), TURNED),
    "outputs flipped": (lambda p, x: jnp.sin(bn(p["bn"], conv(jnp.flip(p["conv"]["kernel"], 2), x))), TURNED),
    "inputs reversed": (lambda p, x: after(p["conv"]["kernel"][:, ::-1], x, p), TURNED),
    "channels reversed": (
        lambda p, x: jnp.sin(bn(p["bn"], conv(p["conv"]["kernel"], x)[..., ::-1])),
        "`rev` reorders its channels, or mixes them with other axes",
    ),
    "bias reversed": (
        lambda p, x: jnp.sin(bn(p["bn"], conv(p["conv"]["kernel"], x) + p["conv"]["bias"][::-1].reshape(1, 1, 3))),
        "between `conv` and it stands `add`",
    ),
    "two biases": (
        lambda p, x: jnp.sin(
            bn(p["bn"], conv(p["conv"]["kernel"], x) + sum(p["conv"][k].reshape(1, 1, 3) for k in ("bias", "offset")))
        ),
        "between `conv` and it stands `add`",
    ),
    "two biases, one by one": (
        lambda p, x: jnp.sin(
            bn(
                p["bn"],
                (conv(p["conv"]["kernel"], x) + p["conv"]["bias"].reshape(1, 1, 3))
                + p["conv"]["offset"].reshape(1, 1, 3),
            )
        ),
        "between `conv` and it stands `add`",
    ),
    "box kernel": (
        lambda p, x: after(jnp.broadcast_to(p["conv"]["kernel"][None], (2, 2, 3, 3)).reshape(4, 3, 3), x, p),
        "whose kernel `conv` is broadcast",
    ),
    "kernel that a reshape transposes": (
        lambda p, x: after(jax.lax.reshape(p["conv"]["kernel"], (2, 3, 3), (0, 2, 1)), x, p),
        TURNED,
    ),
    "batch groups": (
        lambda p, x: jnp.sin(bn(p["bn"], conv(p["conv"]["kernel"], x, batch_group_count=3))),
        "its input is the output of `conv_general_dilated` of a kernel with a kernel",
    ),
    "penalty on the norm": (with_penalty, "the model also returns what `reduce_sum` makes of its variables"),
    "mapped constant": (
        lambda p, x: jnp.sin(
            bn(
                p["bn"] | {"scale": jax.shard_map(jnp.exp, mesh=MESH, in_specs=P(), out_specs=P())(p["bn"]["scale"])},
                conv(p["conv"]["kernel"], x),
            )
        ),
        "what `shard_map` makes of its variables cannot be computed alone",
    ),
    "kept in a Ref": (through_a_ref, "the output of `conv` is also one of the model"),
    "read from a Ref": (around_a_ref, "its input is the output of `get`"),
    "activation": (
        lambda p, x: jnp.sin(bn(p["bn"], jax.nn.relu(conv(p["conv"]["kernel"], x)))),
        "its input is the output of `max` (in `relu`); its output goes to `sin`: no Dense, no Conv",
    ),
    "argument": (
        lambda p, x: jnp.sin(bn(p["bn"], x)),
        "its input is an argument of the model; its output goes to `sin`: no Dense, no Conv",
    ),
    "output": (
        lambda p, x: bn(p["bn"], jnp.sin(x)),
        "its input is the output of `sin`; its output is one of the model",
    ),
    "kernel used twice": (
        lambda p, x: jnp.sin(bn(p["bn"], conv(p["conv"]["kernel"], conv(p["conv"]["kernel"], x)))),
        "its input is the output of `conv_general_dilated`, and the kernel of `conv` is used 2 times; "
        "its output goes to `sin`: no Dense, no Conv",
    ),
    "layer used twice": (
        lambda p, x: (y := conv(p["conv"]["kernel"], x)) - jnp.sin(bn(p["bn"], y)),
        "the output of `conv` is also used by `sub`; its output goes to `sin`: no Dense, no Conv",
    ),
    "norm used by two": (
        lambda p, x: (y := bn(p["bn"], jnp.sin(x)))[:, 1:] + conv(p["conv"]["kernel"], y),
        "its input is the output of `sin`; its output is used 2 times: by `slice`, `conv_general_dilated`",
    ),
    "weight norm": (
        lambda p, x: jnp.sin(bn(p["bn"], conv(jn.weight_standardization(p["conv"]["kernel"]), x))),
        "its input is the output of `conv_general_dilated`, whose kernel is computed, by `",
    ),
    "kernel of the input": (
        lambda p, x: jnp.sin(bn(p["bn"], x @ x[0, :3])),
        "its input is the output of `dot_general`, whose operands both depend on the input",
    ),
    "kernel outside": (
        lambda p, x: jnp.sin(bn(p["bn"], conv(jnp.ones((2, 3, 3)), x))),
        "its input is the output of `conv_general_dilated`, whose kernel is",
    ),
    "padding": (
        lambda p, x: conv(p["conv"]["kernel"], bn(p["bn"], jnp.sin(x)), "SAME"),
        "its input is the output of `sin`; `conv` puts zeros between or around its output: they would need its bias",
    ),
    "dilation": (
        lambda p, x: conv(p["conv"]["kernel"], bn(p["bn"], jnp.sin(x)), [(0, 0)], lhs_dilation=(2,)),
        "`conv` puts zeros between or around its output: they would need its bias",
    ),
    "between": (
        lambda p, x: jnp.sin(bn(p["bn"], conv(p["conv"]["kernel"], x) + p["other"].reshape(1, 1, 3))),
        "between `conv` and it stands `add`",
    ),
    "bias along another axis": (  # as long as there are channels
        lambda p, x: jnp.sin(bn(p["bn"], conv(p["conv"]["kernel"], x) + p["conv"]["bias"].reshape(1, 3, 1))),
        "between `conv` and it stands `add`",
    ),
    "shard_map": (
        lambda p, x: jax.shard_map(
            lambda p, x: bn(p["bn"], conv(p["conv"]["kernel"], x)), mesh=MESH, in_specs=P(), out_specs=P()
        )(p, x),
        "it is inside a `shard_map`",
    ),
    "scale between": (
        lambda p, x: jnp.sin(bn(p["bn"], conv(p["conv"]["kernel"], x) * 2.0)),
        "its input is the output of `mul`",
    ),
    "scan": (scanned, "it is inside a `scan`: unroll it"),
    "used twice": (
        lambda p, x: bn(p["bn"], jnp.sin(bn(p["bn"], conv(p["conv"]["kernel"], x)))),
        "it is used more than once, with `sin` between",
    ),
    "used in two places": (
        lambda p, x: bn(p["bn"], conv(p["conv"]["kernel"], x)) - bn(p["bn"], x[:, 1:]),
        "it is used more than once, with `sub` between",
    ),
    "unused": (lambda p, x: jnp.sin(conv(p["conv"]["kernel"], x)), "the model does not use it"),
    "training": (train, "the model does not read its mean and var: call it in evaluation mode"),
    "other axis": (
        lambda p, x: bn(p["bn"], conv(p["conv"]["kernel"], x).swapaxes(1, 2)),
        "its statistics do not lie along the output features of `conv`",
    ),
    "of another": (of_another, "parameters of another layer enter it, in `mul`"),
    "bias late": (own_bias_late, "['conv']['bias'] is not what is added to the output of `conv`"),
    "not affine": (
        lambda p, x: conv(p["conv"]["kernel"], x) ** p["bn"]["mean"].reshape(1, 1, 3) + p["bn"]["var"].reshape(1, 1, 3),
        "its parameters enter `pow`, which is no scale and bias along one axis",
    ),
    "negative variance": (
        lambda p, x: bn({**p["bn"], "var": -p["bn"]["var"]}, conv(p["conv"]["kernel"], x)),
        "its statistics are not finite, or var + epsilon is not positive",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case):
    model, message = REFUSED[case]
    p = {
        "bn": {"scale": normal(3), "bias": normal(3), "mean": normal(3), "var": jnp.abs(normal(3)) + 0.1},
        "conv": {"kernel": normal(2, 3, 3)},
        "other": normal(3),
    }
    if "bias" in case or case == "of another":
        p["conv"] |= {"bias": normal(3), "offset": normal(3)}
    folded, report = fold(model, p, normal(3, 4, 3))
    assert report.title == "0 of 1 norms folded"
    assert message in report.rows[0]["why not"]
    assert jax.tree.structure(folded) == jax.tree.structure(p)
    jax.tree.map(np.testing.assert_array_equal, folded, p)


def test_zero_shift_passes_padding():
    """Zeros around the output of the norm stay zeros where its shift is 0."""
    p = {"bn": {"mean": jnp.zeros(3), "var": jnp.abs(normal(3)) + 0.1}}
    p["conv"] = {"kernel": normal(3, 3, 2), "bias": normal(2)}

    def model(p, x):
        x = jnp.sin(x)
        x = jn.normalize(x, jn.RunningStats(p["bn"]["mean"], p["bn"]["var"], jnp.array(0), ("c",))) if "bn" in p else x
        return conv(p["conv"]["kernel"], x, "SAME") + p["conv"]["bias"].reshape(1, 1, 2)

    x = normal(2, 5, 3)
    folded, report = fold(model, p, x)
    assert report.rows[0]["the layer stands"] == "after"
    close(model(folded, x), model(p, x))


@pytest.mark.parametrize("var", [1e-12, 1e24])
def test_a_kernel_that_cannot_hold_it_is_refused(var):
    """It would be 1e9 or 1e-9: infinite or 0."""
    p = {"bn": {"mean": jnp.zeros(2), "var": jnp.full(2, var)}, "fc": {"kernel": jnp.full((2, 2), 1e3, jnp.float16)}}

    def model(p, x):
        y = (x @ p["fc"]["kernel"]).astype(jnp.float32)
        return jnp.sin((y - p["bn"]["mean"][None]) * jax.lax.rsqrt(p["bn"]["var"][None]))

    _, report = fold(model, p, jnp.ones((1, 2), jnp.float16))
    assert "['fc']['kernel'] in float16 cannot hold what it would become" in report.rows[0]["why not"]
