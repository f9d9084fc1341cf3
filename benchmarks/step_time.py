"""Time of one norm, forward and with its backward pass, as a ratio to flax.linen in the same run.

    python benchmarks/step_time.py

Minimum of ten interleaved runs. Fresh large arrays cost page faults that swamp everything, for every framework alike:
the script starts itself again with an allocator that keeps its memory.
"""

import importlib.metadata
import os
import sys
import time

ALLOCATOR = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": "4294967296",
    "MALLOC_TRIM_THRESHOLD_": "8589934592",
    "MALLOC_TOP_PAD_": "268435456",
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
}
if any(os.environ.get(name) != value for name, value in ALLOCATOR.items()):
    os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **ALLOCATOR})

import against_flax
import jax
import jax.numpy as jnp


def fastest(functions, args, runs=10):
    best = [float("inf")] * len(functions)
    for run in range(runs + 1):  # the first compiles
        for i, f in enumerate(functions):
            start = time.perf_counter()
            jax.block_until_ready(f(*args))
            best[i] = min(best[i], time.perf_counter() - start) if run else best[i]
    return best


def main() -> None:
    versions = ", ".join(f"{p} {importlib.metadata.version(p)}" for p in ("jax", "flax"))
    print(f"{versions}, {jax.devices()[0].device_kind}\n")
    print("| norm | dtype | forward, ms: flax / ours | ratio | with backward, ms: flax / ours | ratio |")
    print("|---|---|---|---|---|---|")
    for dtype in (jnp.float32, jnp.bfloat16):
        x, g = (jax.random.normal(key, (64, 32, 32, 64)).astype(dtype) for key in jax.random.split(jax.random.key(0)))
        scale, bias = jnp.ones(64), jnp.zeros(64)
        for name, (module, ours) in against_flax.NORMS.items():
            model = module.clone(dtype=dtype)
            variables = model.init(jax.random.key(0), x[:1])

            def theirs(x, scale, bias, model=model, variables=variables):
                params = {key: {"scale": scale, "bias": bias}[key] for key in variables["params"]}
                return model.apply({**variables, "params": params}, x, mutable=["batch_stats"])[0]

            both = (theirs, ours)
            row = [f"| {name} | {dtype.__name__} "]
            backward = [jax.jit(lambda x, s, b, g, f=f: jax.vjp(f, x, s, b)[1](g)) for f in both]
            for functions, args in (([jax.jit(f) for f in both], ()), (backward, (g,))):
                a, b = (1e3 * t for t in fastest(functions, (x, scale, bias, *args)))
                row.append(f"| {a:.1f} / {b:.1f} | {b / a:.2f} ")
            print("".join(row) + "|", flush=True)


if __name__ == "__main__":
    main()
