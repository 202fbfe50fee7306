"""What every test file shares: how programs are compiled, and let go.

Tests compile many programs and run each but a few times: LLVM's optimizer would
take half of their time. `XLA_FLAGS` of one's own are kept, and come last.

A compiled XLA:CPU program keeps its memory mappings. A worker that runs file
after file would reach the kernel's limit of 65,530 mappings (and several GiB),
where the compiler dies of a segmentation fault.
"""

import gc
import os

_QUICK = '--xla_backend_optimization_level=0'
os.environ['XLA_FLAGS'] = f'{_QUICK} {os.environ.get("XLA_FLAGS", "")}'.strip()

import jax  # noqa: E402
import pytest  # noqa: E402


@pytest.fixture(autouse=True, scope='module')
def release_programs():
  yield
  jax.clear_caches()
  gc.collect()
