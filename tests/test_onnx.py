"""ONNX's own node test cases for every normalization operator: inputs and outputs that nobody here wrote.

The expanded twins of a case (the same numbers through primitive operators) are left out; the rest is 55 cases, of which
47 are norms of ours and 8 are listed with the reason why they are not.
"""

import warnings

import numpy as np

import jaxnorm as jn

# Their outputs are float32 NumPy, ours float32 XLA: a handful of roundings of 6e-8 on either side.
TOLERANCE = {"rtol": 1e-6, "atol": 1e-6}


def cases():
    """{operator: [(name, attributes, inputs, outputs)]}. It runs every generator of ONNX, for 5 s: call it once."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the generators of other operators overflow on purpose
        from onnx import helper
        from onnx.backend.test.case.node import collect_testcases

        found = {}
        for case in collect_testcases(None):
            nodes = case.model.graph.node
            if len(nodes) != 1 or nodes[0].op_type not in COUNTS:
                continue
            attributes = {a.name: helper.get_attribute_value(a) for a in nodes[0].attribute}
            for inputs, outputs in case.data_sets:
                found.setdefault(nodes[0].op_type, []).append((case.name, attributes, inputs, outputs))
    return found


def trailing(x, attributes):
    """The layout of `x`, and its names from `axis` on: what layer and RMS norm average, and where scale differs."""
    names = [f"d{i}" for i in range(x.ndim)]
    return " ".join(names), " ".join(names[attributes.get("axis", -1) :])


def batch(x, scale, bias, mean, var, *, epsilon=1e-5, momentum=0.9, training_mode=0):
    running = jn.RunningStats(mean=mean, var=var, num_updates=np.int32(0), axes=("c",))
    affine = {"scale": scale, "bias": bias, "features": "c", "epsilon": epsilon}
    if not training_mode:
        return [jn.normalize(x, running, "n c ...", **affine)]
    y, running = jn.batch_norm(x, running, "n c ...", "n ...", momentum=momentum, **affine)
    return [y, running.mean, running.var]


def layer(x, scale, bias, *, epsilon=1e-5, **attributes):
    layout, over = trailing(x, attributes)
    y = jn.layer_norm(x, layout, over, scale=scale, bias=bias, epsilon=epsilon)
    moments = jn.moments(x, layout, over)
    return [y, moments.mean, 1 / np.sqrt(moments.var + np.float32(epsilon))]


def rms(x, scale, *, epsilon=1e-5, **attributes):
    return [jn.rms_norm(x, *trailing(x, attributes), scale=scale, epsilon=epsilon)]


def instance(x, scale, bias, *, epsilon=1e-5):
    return [jn.instance_norm(x, "n c ...", scale=scale, bias=bias, features="c", epsilon=epsilon)]


def group(x, scale, bias, *, num_groups, epsilon=1e-5):
    return [jn.group_norm(x, num_groups, "n c ...", scale=scale, bias=bias, features="c", epsilon=epsilon)]


def mean_variance(x):
    # ONNX divides by std + 1e-9: in float32 that is std
    return [jn.standardize(x, "n c h w", "n h w", epsilon=0.0)[0]]


OURS = {
    "BatchNormalization": (batch, 4),
    "LayerNormalization": (layer, 19),
    "RMSNormalization": (rms, 19),
    "InstanceNormalization": (instance, 2),
    "GroupNormalization": (group, 2),
    "MeanVarianceNormalization": (mean_variance, 1),
}
NOT_OURS = {
    "LpNormalization": (6, "divides by the length of a vector (sum of |x|^p), not by a mean over its elements"),
    "LRN": (2, "averages over a window that slides along the channels: its statistics lie along no axis of names"),
}
COUNTS = {name: count for name, (_, count) in OURS.items()} | {name: count for name, (count, _) in NOT_OURS.items()}


def test_node_cases(subtests):
    found = cases()
    assert {name: len(of_it) for name, of_it in found.items()} == COUNTS  # none is lost
    assert sum(COUNTS.values()) == 55
    for operator, (function, _) in OURS.items():
        for name, attributes, inputs, outputs in found[operator]:
            with subtests.test(name):
                for result, output in zip(function(*inputs, **attributes), outputs, strict=True):
                    np.testing.assert_allclose(np.reshape(result, output.shape), output, **TOLERANCE)
