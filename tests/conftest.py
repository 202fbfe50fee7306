"""What every test file shares: how programs are compiled, and let go.

Tests compile many programs and run each but a few times: LLVM's optimizer would
take half of their time, and XLA's emitters of fusions much of what is left (27
s of a core for a training step of V3's, 15 without; jax 0.11 has no others).
`XLA_FLAGS` of one's own are kept, and come last.

A compiled XLA:CPU program keeps its memory mappings. A worker that runs file
after file would reach the kernel's limit of 65,530 mappings (and several GiB),
where the compiler dies of a segmentation fault.
"""

import gc
import importlib.metadata
import os

_QUICK = ['--xla_backend_optimization_level=0']
if importlib.metadata.version('jaxlib').startswith('0.10.'):
  _QUICK.append('--xla_cpu_use_fusion_emitters=false')
_OWN = os.environ.get('XLA_FLAGS', '').split()
os.environ['XLA_FLAGS'] = ' '.join(_QUICK + _OWN)

import jax  # noqa: E402
import pytest  # noqa: E402


@pytest.fixture(autouse=True, scope='module')
def release_programs():
  yield
  jax.clear_caches()
  gc.collect()
