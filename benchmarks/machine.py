"""Names the processor that figures were measured on."""

import os
import platform


def processor() -> str:
  """Returns the processor's name, its widest vector unit and its cores."""
  name, flags = platform.processor() or platform.machine(), ''
  try:
    with open('/proc/cpuinfo', encoding='utf-8') as file:
      fields = dict(
        line.split(':', 1) for line in file.read().splitlines() if ':' in line
      )
    fields = {key.strip(): value.strip() for key, value in fields.items()}
    name, flags = fields.get('model name', name), fields.get('flags', '')
  except OSError:
    pass
  units = ('amx_bf16', 'avx512f', 'avx2')
  unit = next((u for u in units if u in flags.split()), 'no AVX2')
  return f'{name}, {unit}, {os.cpu_count()} cores'
