"""Compiled programs are kept between tests, files and runs of the tests."""

import os
from pathlib import Path

import jax

_HOME = os.environ.get('XDG_CACHE_HOME') or Path.home() / '.cache'
jax.config.update(
  'jax_compilation_cache_dir', str(Path(_HOME) / 'deepseek_jax' / 'tests')
)
jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.3)
jax.config.update('jax_persistent_cache_min_entry_size_bytes', 0)
