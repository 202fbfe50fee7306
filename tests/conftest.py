"""What every test file shares: each gives back the programs that it compiled.

A compiled XLA:CPU program keeps its memory mappings. A worker that runs file
after file would reach the kernel's limit of 65,530 mappings (and several GiB),
where the compiler dies of a segmentation fault.
"""

import gc

import jax
import pytest


@pytest.fixture(autouse=True, scope='module')
def release_programs():
  yield
  jax.clear_caches()
  gc.collect()
