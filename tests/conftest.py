"""Strict JAX for every test: eight CPU devices, no silent promotion, compiled programs kept between runs.

LLVM's optimizations are left out: compiling is what these tests cost, and half of that is LLVM. XLA's own, which decide
what is fused and kept, are not. Where the order of a sum matters, tests/test_exact.py compiles as users do.

Set at import: pytest reads this file before any test module, in every xdist worker, so JAX has not started yet.
"""

import os
from pathlib import Path

import jax
import pytest

from jaxnorm import cpu

os.environ["XLA_FLAGS"] = f"--xla_backend_optimization_level=0 {os.environ.get('XLA_FLAGS', '')}"
jax.config.update("jax_platforms", os.environ.get("JAX_PLATFORMS", "cpu"))
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_compilation_cache_dir", str(Path(__file__).parents[1] / ".jax_cache"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def pytest_configure(config):
    # JAX writes the cache without a lock: a worker may meet an entry that another one is still writing. It then
    # compiles for itself and says so, which says nothing about the code under test.
    config.addinivalue_line("filterwarnings", "ignore:Error reading persistent compilation cache entry")


@pytest.fixture(params=["large", "small", "elsewhere"])
def form(request, monkeypatch):
    """The form of the arithmetic (jaxnorm/cpu.py) that large and small arrays get on one CPU, and other platforms."""
    monkeypatch.setattr(cpu, "alone", lambda: True)
    monkeypatch.setattr(cpu, "SMALL", 2**40 if request.param == "small" else 0)
    if request.param == "elsewhere":
        monkeypatch.setattr(jax.lax, "platform_dependent", lambda *args, default, **_: default(*args))
    jax.clear_caches()
    yield request.param
    jax.clear_caches()
