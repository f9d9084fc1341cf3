"""Every norm beyond the five of reference.py once more, in float64 NumPy, each from the formula of its paper.

Activations are [n, h, c], kernels [..., o], what goes along the channels [c]. A function has the name of jaxnorm's; its
**gain is scale and bias, which broadcast to x. Running state goes in as arrays and comes out as a tuple of arrays.
A mask is True where an element counts: elsewhere it reaches no statistic, is normalized like the rest, and is taken for
0 where it is not finite. Statistics of nothing are mean 0 and variance 0, and leave the running ones as they are.
"""

import math

import numpy as np


def wide(x):
    x = np.asarray(x)
    return x.astype(complex if np.iscomplexobj(x) else float)


def clean(x, mask=None):
    """`x` in float64, with 0 in masked slots that are not finite."""
    x = wide(x)
    return x if mask is None else np.where(~np.broadcast_to(mask, x.shape) & ~np.isfinite(x), 0, x)


def stats(x, axes, mask=None, *, center=True, weights=None):
    """count = sum(w), mean = sum(w x) / count, var = sum(w |x - mean|^2) / count over `axes`, which are kept as 1."""
    x = wide(x)
    weight = np.ones(x.shape) if weights is None else np.broadcast_to(wide(weights), x.shape)
    if mask is not None:  # both are selected: NaN times 0 would be NaN
        weight, x = np.where(mask, weight, 0), np.where(mask, x, 0)
    count = weight.sum(axes, keepdims=True)
    some = np.where(count > 0, count, 1)
    mean = (weight * x).sum(axes, keepdims=True) / some if center else np.zeros(count.shape)
    return count, mean, (weight * abs(x - mean) ** 2).sum(axes, keepdims=True) / some


def batch_stats(x, mask=None, **options):
    """Count, mean and var of each channel, [c]: over every axis but the last."""
    return [a.reshape(-1) for a in stats(x, tuple(range(np.ndim(x) - 1)), mask, **options)]


def group_stats(x, num_groups, mask=None):
    """Mean and var of each example and group of consecutive channels, [n, 1, c]: a channel has those of its group."""
    parts = (*x.shape[:-1], num_groups, x.shape[-1] // num_groups)
    valid = np.broadcast_to(True if mask is None else mask, x.shape).reshape(parts)
    return [np.repeat(a[..., 0], parts[-1], axis=-1) for a in stats(x.reshape(parts), (1, 3), valid)[1:]]


def merge(a, b):
    """(count, mean, var) of the elements of two such triples taken together."""
    count, some = a[0] + b[0], np.where(a[0] + b[0] > 0, a[0] + b[0], 1)
    mean = (a[0] * a[1] + b[0] * b[1]) / some
    return count, mean, sum(part[0] * (part[2] + abs(part[1] - mean) ** 2) for part in (a, b)) / some


def affine(z, scale=None, bias=None):
    z = z if scale is None else z * wide(scale)
    return z if bias is None else z + wide(bias)


def standard(x, mean, var, epsilon):
    return (x - wide(mean)) / np.sqrt(wide(var) + epsilon)


def updated(old, batch, count, momentum):
    """momentum * old + (1 - momentum) * batch, and the old value where the batch had no element."""
    return np.where(count > 0, momentum * wide(old) + (1 - momentum) * batch, old)


def batch_norm(x, mean, var, *, scale=None, bias=None, momentum=0.99, epsilon=1e-5, mask=None, train=True):
    """(x - mean_b) / sqrt(var_b + epsilon) * scale + bias; with train=False by the running statistics."""
    count, *used = batch_stats(x, mask) if train else (0, wide(mean), wide(var))
    running = tuple(updated(old, batch, count, momentum) for old, batch in zip((mean, var), used, strict=True))
    return affine(standard(clean(x, mask), *used, epsilon), scale, bias), running


def layer_norm(x, *, scale=None, bias=None, epsilon=1e-6, mask=None):
    return affine(standard(clean(x, mask), *stats(x, -1, mask)[1:], epsilon), scale, bias)


def rms_norm(x, *, scale=None, bias=None, epsilon=1e-6, mask=None):
    return affine(clean(x, mask) / np.sqrt(stats(x, -1, mask, center=False)[2] + epsilon), scale, bias)


def ghost_batch_norm(x, mean, var, num_ghosts, *, scale=None, bias=None, momentum=0.99, epsilon=1e-5, mask=None):
    """Hoffer 2017, algorithm 1: batch norm of `num_ghosts` parts. The running statistics take in the whole at once."""
    valid = np.broadcast_to(True if mask is None else mask, np.shape(x))
    parts = zip(np.split(wide(x), num_ghosts), np.split(valid, num_ghosts), strict=True)
    ys = [batch_norm(part, mean, var, scale=scale, bias=bias, epsilon=epsilon, mask=ok)[0] for part, ok in parts]
    return np.concatenate(ys), batch_norm(x, mean, var, momentum=momentum, mask=mask)[1]


def batch_renorm(
    x, mean, var, *, num_updates=0, r_max=None, d_max=None, momentum=0.99, epsilon=1e-5, mask=None, **gain
):
    """Ioffe 2017, algorithm 1: ((x - mean_b) / s_b * r + d) * scale + bias,  r = s_b / s,  d = (mean_b - mean) / s."""
    r_max = np.interp(num_updates, [5000, 40000], [1, 3]) if r_max is None else r_max  # section 4.2
    d_max = np.interp(num_updates, [5000, 25000], [0, 5]) if d_max is None else d_max
    _, mean_b, var_b = batch_stats(x, mask)
    s_b, s = np.sqrt(var_b + epsilon), np.sqrt(wide(var) + epsilon)
    r, d = np.clip(s_b / s, 1 / r_max, r_max), np.clip((mean_b - wide(mean)) / s, -d_max, d_max)
    y = affine((clean(x, mask) - mean_b) / s_b * r + d, **gain)
    return y, batch_norm(x, mean, var, momentum=momentum, mask=mask)[1]


def select_stats(mean, var, which):
    return wide(mean)[which], wide(var)[which]


def split_batch_norm(x, mean, var, which, **options):
    """Batch norm that updates set `which` of the running statistics, [set, c], and no other."""
    y, chosen = batch_norm(x, *select_stats(mean, var, which), **options)
    mean, var = wide(mean), wide(var)
    mean[which], var[which] = chosen
    return y, (mean, var)


def frozen_batch_norm(x, mean, var, *, scale=None, bias=None, epsilon=1e-5):
    return affine(standard(wide(x), mean, var, epsilon), scale, bias)


def streaming_norm(x, mean, var, *, num_updates=0, momentum=0.99, epsilon=1e-5, mask=None, debias=True, **gain):
    """Liao 2016: by the running statistics, batch included; debias: those from 0, over 1 - momentum^t (Adam's)."""
    count, *batch = batch_stats(x, mask)
    before, after = (1 - momentum**t if debias else 1 for t in (num_updates, num_updates + 1))
    both = zip((wide(mean), wide(var)), batch, strict=True)
    new = [np.where(count > 0, (momentum * before * a + (1 - momentum) * b) / after, a) for a, b in both]
    return affine(standard(clean(x, mask), *new, epsilon), **gain), tuple(new)


def virtual_batch_norm(x, count, mean, var, *, scale=None, bias=None, epsilon=1e-5, mask=None):
    """Salimans 2016, section 3.5: each example by the reference batch (count, mean, var, [c]) and itself together."""
    both = merge(stats(x, 1, mask), (wide(count), wide(mean), wide(var)))
    return affine(standard(clean(x, mask), *both[1:], epsilon), scale, bias)


def cross_iteration_batch_norm(apply, kernel, x, history, *, window=4, scale=None, bias=None, epsilon=1e-5, mask=None):
    """Yao 2021, for z = apply(kernel, x), [..., o]. `history`: [] at first, then what came back.

    mean_t(kernel) = mean_t + sum(dmean_t / dkernel_t * (kernel - kernel_t)),   nu_t(kernel) likewise
    mean = average(mean_t(kernel)),   var = average(max(nu_t(kernel), mean_t(kernel)^2)) - mean^2
    """
    kernel, inputs = wide(kernel), tuple(range(np.ndim(kernel) - 1))
    dmean, dnu = np.zeros(kernel.shape), np.zeros(kernel.shape)
    # A layer is linear in its kernel, so its mean is too and its mean square is quadratic, and central differences
    # of any step are exact. Output channel o depends on kernel[..., o] alone.
    for index in np.ndindex(kernel.shape[:-1]):
        step = np.zeros(kernel.shape)
        step[index] = 1
        _, mean_up, var_up = batch_stats(apply(kernel + step, x), mask)
        _, mean_down, var_down = batch_stats(apply(kernel - step, x), mask)
        dmean[index], dnu[index] = (mean_up - mean_down) / 2, (var_up + mean_up**2 - var_down - mean_down**2) / 2
    z = apply(kernel, x)
    count, mean, var = batch_stats(z, mask)
    history = [*history, (kernel, count, mean, var + mean**2, dmean, dnu)]
    total = np.zeros((3, kernel.shape[-1]))  # of steps, means and mean squares; no step for a channel it did not see
    for kernel_t, count, mean, nu, dmean, dnu in history:  # the last is this step: its kernel has not moved
        mean = mean + (dmean * (kernel - kernel_t)).sum(inputs)
        nu = nu + (dnu * (kernel - kernel_t)).sum(inputs)
        total += np.where(count > 0, [np.ones(len(mean)), mean, np.maximum(nu, mean**2)], 0)
    _, mean, nu = total / np.maximum(total[0], 1)
    y = affine(standard(clean(z, mask), mean, nu - mean**2, epsilon), scale, bias)
    return y, history[max(0, len(history) - (window - 1)) :]


def adaptive_instance_norm(x, style, *, epsilon=1e-5, mask=None, style_mask=None):
    """Huang and Belongie 2017: s(style) (x - mean(x)) / s(x) + mean(style),  s = sqrt(var + epsilon)."""
    _, mean, var = stats(style, 1, style_mask)
    return np.sqrt(var + epsilon) * standard(clean(x, mask), *stats(x, 1, mask)[1:], epsilon) + mean


def adaptive_layer_norm(x, scale, bias, *, scale_offset=1.0, epsilon=1e-6, mask=None):
    """Peebles and Xie 2023: layer_norm(x) * (1 + scale) + bias, scale and bias [n, c]."""
    return film(layer_norm(x, epsilon=epsilon, mask=mask), scale, bias, scale_offset=scale_offset)


def film(x, scale, bias=None, *, scale_offset=0.0):
    """Perez 2018: scale * x + bias, scale and bias [n, c]."""
    bias = None if bias is None else wide(bias)[:, None, :]
    return affine(wide(x), scale_offset + wide(scale)[:, None, :], bias)


def conditional_batch_norm(x, mean, var, labels, *, scale=None, bias=None, **options):
    """Batch norm, its scale and bias [classes, c] those of the label of each example."""
    z, running = batch_norm(x, mean, var, **options)
    scale, bias = (None if a is None else wide(a)[np.asarray(labels)][:, None, :] for a in (scale, bias))
    return affine(z, scale, bias), running


def spade(x, mean, var, scale, bias, *, scale_offset=1.0, **options):
    """Park 2019: batch_norm(x) * (offset + scale) + bias at each place, scale and bias [n, h, c]."""
    z, running = batch_norm(x, mean, var, **options)
    return affine(z, scale_offset + wide(scale), bias), running


def partial_rms_norm(x, fraction=0.0625, *, scale=None, bias=None, epsilon=1e-6, mask=None):
    """Zhang and Sennrich 2019: x / sqrt(mean(first k squares) + epsilon),  k = ceil(fraction * c).
    Those of the first k that count."""
    few = np.arange(np.shape(x)[-1]) < math.ceil(fraction * np.shape(x)[-1])
    square = stats(x, -1, few if mask is None else mask & few, center=False)[2]
    return affine(clean(x, mask) / np.sqrt(square + epsilon), scale, bias)


def scale_norm(x, scale, *, epsilon=1e-5, mask=None):
    """Nguyen and Salazar 2019: g x / |x|, g one number."""
    count, _, square = stats(x, -1, mask, center=False)
    return wide(scale) * clean(x, mask) / np.sqrt(count * square + epsilon)


def l2_norm(x, *, scale=None, bias=None, epsilon=1e-12, mask=None):
    return affine(scale_norm(x, 1, epsilon=epsilon, mask=mask), scale, bias)


def qk_norm(query, key, *, query_scale=None, key_scale=None, epsilon=1e-6, center=False):
    """Henry 2020 normalize the query and the key of attention along d, by |x|; with RMS or layer norm here."""
    norm = layer_norm if center else rms_norm
    return norm(query, scale=query_scale, epsilon=epsilon), norm(key, scale=key_scale, epsilon=epsilon)


def gated_rms_norm(x, gate, *, scale=None, epsilon=1e-6, gate_first=False, mask=None):
    """rms_norm(x) * scale * silu(gate), or rms_norm(x * silu(gate)) * scale."""
    options, silu = {"scale": scale, "epsilon": epsilon, "mask": mask}, wide(gate) / (1 + np.exp(-wide(gate)))
    return rms_norm(wide(x) * silu, **options) if gate_first else rms_norm(x, **options) * silu


def add_norm(x, residual, norm=layer_norm, **options):
    total = wide(x) + wide(residual)
    return norm(total, **options), total


def global_response_norm(x, *, scale=None, bias=None, epsilon=1e-6, mask=None):
    """Woo 2023: x + scale * x * N + bias,  N = G / (mean(G along c) + epsilon),  G = |x| over h.
    A channel with no element has G = 0, and is one of the c."""
    count, _, square = stats(x, 1, mask, center=False)
    x, g = clean(x, mask), np.sqrt(count * square)
    return x + affine(x * (g / (g.mean(-1, keepdims=True) + epsilon)), scale, bias)


def dynamic_tanh(x, alpha, *, scale=None, bias=None):
    """Zhu 2025: scale * tanh(alpha x) + bias."""
    return affine(np.tanh(wide(alpha) * wide(x)), scale, bias)


def dynamic_erf(x, alpha, shift, *, scale=None, bias=None):
    return affine(np.vectorize(math.erf, otypes=[float])(wide(alpha) * wide(x) + wide(shift)), scale, bias)


def positional_norm(x, *, epsilon=1e-5, mask=None):
    """Li 2019: (x - mean) / sqrt(var + epsilon) along c, and count, mean, var [n, h], to be used later."""
    count, mean, var = stats(x, -1, mask)
    return standard(clean(x, mask), mean, var, epsilon), (count[..., 0], mean[..., 0], var[..., 0])


def filter_response_norm(x, threshold=None, *, scale=None, bias=None, epsilon=1e-6, mask=None):
    """Singh and Krishnan 2020: max(scale * x / sqrt(nu2 + epsilon) + bias, threshold)."""
    z = affine(clean(x, mask) / np.sqrt(stats(x, 1, mask, center=False)[2] + epsilon), scale, bias)
    return z if threshold is None else np.maximum(z, wide(threshold))


def evo_norm_b0(x, mean, var, *, v, scale=None, bias=None, momentum=0.99, epsilon=1e-5, mask=None, train=True):
    """Liu 2020: x / max(s_batch, v x + s_instance) * scale + bias,  s = sqrt(var + epsilon)."""
    _, running = batch_norm(x, mean, var, momentum=momentum, mask=mask, train=train)
    s_batch = np.sqrt((batch_stats(x, mask)[2] if train else wide(var)) + epsilon)
    x, s_instance = clean(x, mask), np.sqrt(stats(x, 1, mask)[2] + epsilon)
    return affine(x / np.maximum(s_batch, wide(v) * x + s_instance), scale, bias), running


def evo_norm_s0(x, num_groups, *, v, scale=None, bias=None, epsilon=1e-5, mask=None):
    """Liu 2020: x sigmoid(v x) / s_group * scale + bias."""
    x, s_group = clean(x, mask), np.sqrt(group_stats(wide(x), num_groups, mask)[1] + epsilon)
    return affine(x / (1 + np.exp(-wide(v) * x)) / s_group, scale, bias)


def switchable_norm(
    x, mean, var, mean_logits, var_logits, *, momentum=0.99, epsilon=1e-5, mask=None, train=True, **gain
):
    """Luo 2019: mean = sum(w_k mean_k), var = sum(w'_k var_k) over k = instance, layer, batch."""
    _, running = batch_norm(x, mean, var, momentum=momentum, mask=mask, train=train)
    three = [stats(x, 1, mask)[1:], stats(x, (1, 2), mask)[1:], batch_stats(x, mask)[1:] if train else (mean, var)]
    weights = [np.exp(wide(logits)) / np.exp(wide(logits)).sum() for logits in (mean_logits, var_logits)]
    mean, var = (sum(weights[i][k] * three[k][i] for k in range(3)) for i in range(2))
    return affine(standard(clean(x, mask), mean, var, epsilon), **gain), running


def local_response_norm(x, size=5, *, alpha=1e-4, power=0.75, offset=1.0, mask=None):
    """Krizhevsky 2012, section 3.3: x / (offset + alpha / size * sum(|x|^2 in the window, cut at the ends))^power."""
    x, y = clean(x, mask), clean(x, mask)
    square = np.where(True if mask is None else mask, abs(x) ** 2, 0)
    for i in range(x.shape[-1]):
        window = square[..., max(0, i - size // 2) : i + (size - 1) // 2 + 1]
        y[..., i] = x[..., i] / (offset + alpha / size * window.sum(-1)) ** power
    return y


def batch_channel_norm(x, mean, var, num_groups, *, channel_scale=None, channel_bias=None, epsilon=1e-5, **options):
    """Qiao 2019: batch norm, and group norm of what it gives."""
    z, running = batch_norm(x, mean, var, epsilon=epsilon, **options)
    z = standard(z, *group_stats(z, num_groups, options.get("mask")), epsilon)
    return affine(z, channel_scale, channel_bias), running


def whiten(root, x, mean, cov, *, scale=None, bias=None, momentum=0.99, epsilon=1e-5, mask=None, train=True):
    """W (x - mean) for each group of consecutive channels, W = root(cov + epsilon I). cov is [groups, size, size].
    A place counts for a group when all the channels of the group count there."""
    valid = np.broadcast_to(True if mask is None else mask, np.shape(x))
    x, mean, cov = clean(x, mask), wide(mean), wide(cov)
    y, new_mean, new_cov, size = np.zeros_like(x), mean.copy(), cov.copy(), cov.shape[-1]
    for g in range(len(cov)):
        at = slice(g * size, (g + 1) * size)
        m, s = mean[at], cov[g]
        if train:
            rows = x[..., at][valid[..., at].all(-1)]  # [places, size]
            m = rows.sum(0) / max(len(rows), 1)
            s = (rows - m).T @ (rows - m) / max(len(rows), 1)
            new_mean[at], new_cov[g] = (updated(*pair, len(rows), momentum) for pair in ((mean[at], m), (cov[g], s)))
        # A channel that is masked at a place is whitened there like the rest, and is not mixed into the others.
        w, c, ok = root(s + epsilon * np.eye(size)), x[..., at] - m, valid[..., at]
        y[..., at] = np.where(ok, c, 0) @ w.T + np.where(ok, 0, c) * np.diag(w)
    return affine(y, scale, bias), (new_mean, new_cov)


def decorrelated_batch_norm(x, mean, cov, **options):
    """Huang 2018 (ZCA): W = D diag(lambda)^(-1/2) D^T, lambda and D the eigenpairs of cov + epsilon I."""

    def root(s):
        values, vectors = np.linalg.eigh(s)
        return vectors @ np.diag(values**-0.5) @ vectors.T

    return whiten(root, x, mean, cov, **options)


def iterative_norm(x, mean, cov, *, num_iterations=5, **options):
    """Huang 2019, algorithm 1: W = P_T / sqrt(trace(S)),  P_k+1 = (3 P_k - P_k^3 S / trace(S)) / 2,  P_0 = I."""

    def root(s):
        p = np.eye(len(s))
        for _ in range(num_iterations):
            p = (3 * p - p @ p @ p @ s / np.trace(s)) / 2
        return p / np.sqrt(np.trace(s))

    return whiten(root, x, mean, cov, **options)


def weight_norm(kernel, *, scale=None, epsilon=0.0):
    """Salimans and Kingma 2016: scale * v / |v|."""
    count, _, square = batch_stats(kernel, center=False)
    return affine(wide(kernel) / np.sqrt(count * square + epsilon), scale)


def weight_standardization(kernel, *, scale=None, epsilon=1e-5):
    """Qiao 2019: (w - mean) / sqrt(var + epsilon) * scale."""
    return affine(standard(wide(kernel), *batch_stats(kernel)[1:], epsilon), scale)


def scaled_weight_standardization(kernel, *, scale=None, gain=1.0, epsilon=1e-4):
    """Brock 2021: gain * scale * (w - mean) / sqrt(fan_in * var + epsilon)."""
    fan_in, mean, var = batch_stats(kernel)
    return affine(gain * standard(wide(kernel), mean, fan_in * var, epsilon), scale)


def spectral_norm(kernel, u, *, num_steps=1, epsilon=1e-12):
    """Miyato 2018, algorithm 1: w / sigma,  sigma = v^T w u after `num_steps` (1 or more) power steps from u, [o]."""
    w, u = wide(kernel).reshape(-1, np.shape(kernel)[-1]), wide(u)
    for _ in range(num_steps):
        v = w @ u / max(np.linalg.norm(w @ u), epsilon)
        u = w.T @ v / max(np.linalg.norm(w.T @ v), epsilon)
    sigma = v @ w @ u
    return (w / sigma).reshape(np.shape(kernel)), (u, sigma)


def map_kernels(function, params, where="kernel", key=None):
    """Nested dicts with `function` of every leaf whose own key is `where`."""
    if isinstance(params, dict):
        return {key: map_kernels(function, leaf, where, key) for key, leaf in params.items()}
    return function(params) if key == where else params


def observe(seen, x, *, mask=None, weights=None):
    """`seen`, the (count, mean, var) [c] of all so far and three zeros at first, with the elements of one more x."""
    return merge(seen, batch_stats(x, mask, weights=weights))


def normalize(seen, x, *, clip=None, epsilon=1e-8):
    y = standard(wide(x), *seen[1:], epsilon)
    return y if clip is None else np.clip(y, -clip, clip)


def denormalize(seen, y, *, epsilon=1e-8):
    return wide(y) * np.sqrt(seen[2] + epsilon) + seen[1]
