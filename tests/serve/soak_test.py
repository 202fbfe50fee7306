"""200 clients and 2,000 requests on loopback: no crash, and no leak.

Whole answers, streams, cut streams, slow readers, forms, malformed and
oversized bodies, in one mixture. Prints what clients waited for.
"""

import asyncio
import collections
import json
import os
import random
import re
import subprocess
import sys
import time
from pathlib import Path

import httpx2 as httpx
import numpy as np
import pytest
from absl.testing import absltest

from tests.serve import malformed_test

_ROOT = Path(__file__).parents[2]
_CLIENTS, _REQUESTS = 200, 2000
_JSON = {'content-type': 'application/json'}
_REGEX = {'type': 'regex', 'regex': '[a-z]{3,9}'}
_CHAT = '/v1/chat/completions'
_WRONG = [('/v1/completions', body) for _, body in malformed_test._BODIES] + [
  (path, json.dumps({**base, field: value}).encode())
  for path, base, field, value in malformed_test._CASES
  # This model has more tokens, and constrains its answers.
  if value not in ([261], {'type': 'json_object'})
]
_KINDS = {
  'whole': 20,
  'stream': 30,
  'cut': 15,
  'slow': 5,
  'left': 5,
  'wrong': 36,
  'large': 5,
  'form': 4,
  'chat': 15,
}


class _Told:
  """Holds what the clients saw."""

  def __init__(self, rng):
    self.kinds = collections.Counter()
    self.left_wrong = rng.sample(_WRONG, len(_WRONG))
    self.first, self.gaps, self.wrong = [], [], []

  def expect(self, kind, response, statuses):
    self.kinds[f'{kind} {response.status_code}'] += 1
    if response.status_code not in statuses:
      self.wrong.append((kind, response.status_code))


def _body(rng, **fields):
  prompt = ''.join(rng.choices('abcdef \n', k=rng.randint(1, 60)))
  return {
    'prompt': prompt,
    'max_tokens': rng.randint(1, 40),
    'temperature': rng.choice([0, 1]),
    'n': rng.choice([1, 1, 1, 2]),
    **fields,
  }


async def _stream(client, told, rng, kind):
  body = _body(rng, stream=True, n=1, max_tokens=40)
  last, seen = time.monotonic(), 0
  async with client.stream('POST', '/v1/completions', json=body) as response:
    told.expect(kind, response, (200, 429))
    if response.status_code != 200:
      return
    async for line in response.aiter_lines():
      if not line.startswith('data: {'):
        continue
      now = time.monotonic()
      (told.gaps if seen else told.first).append(now - last)
      last, seen = now, seen + 1
      if kind == 'cut' and seen >= rng.randint(0, 5):
        return
      if kind == 'slow':
        await asyncio.sleep(0.05)


async def _one(client, told, rng):
  (kind,) = rng.choices([*_KINDS], [*_KINDS.values()])
  post = lambda **more: client.post('/v1/completions', **more)
  if kind in ('stream', 'cut', 'slow'):
    await _stream(client, told, rng, kind)
  elif kind == 'left':
    try:
      await post(json=_body(rng, max_tokens=60), timeout=0.05)
    except httpx.TimeoutException:
      told.kinds['left'] += 1
  elif kind == 'wrong':
    # Each once, then any again.
    path, body = (told.left_wrong or [rng.choice(_WRONG)]).pop()
    response = await client.post(path, content=body, headers=_JSON)
    told.expect(kind, response, (400, 404, 413, 429))
    if response.status_code == 429:
      told.left_wrong.append((path, body))
  elif kind == 'large':
    response = await post(content=b' ' * 200_000, headers=_JSON)
    told.expect(kind, response, (413, 429))
  elif kind == 'form':
    body = _body(rng, response_format=_REGEX, n=1, max_tokens=12)
    response = await post(json=body)
    told.expect(kind, response, (200, 429))
  elif kind == 'chat':
    said = ''.join(rng.choices('abcdef ', k=rng.randint(1, 30)))
    body = {
      'messages': [{'role': 'user', 'content': said}],
      'max_tokens': rng.randint(1, 40),
      'temperature': rng.choice([0, 1]),
    }
    told.expect(kind, await client.post(_CHAT, json=body), (200, 429))
  else:
    told.expect(kind, await post(json=_body(rng)), (200, 429))


async def _soak(url, requests, seed):
  told, left = _Told(random.Random(seed)), iter(range(requests))

  async def client_of(number):
    rng = random.Random(f'{seed} {number}')
    async with httpx.AsyncClient(
      base_url=url, timeout=300, verify=False
    ) as client:
      for _ in left:
        await _one(client, told, rng)

  await asyncio.gather(*(client_of(i) for i in range(_CLIENTS)))
  return told


def _resident(pid):
  """Returns the resident memory of a process in MiB."""
  status = Path(f'/proc/{pid}/status').read_text()
  return int(re.search(r'VmRSS:\s+(\d+)', status)[1]) / 1024


def _numbers(url):
  text = httpx.get(url + '/metrics').text
  found = re.findall(r'^deepseek_jax_(\w+) ([\d.e+-]+)$', text, re.MULTILINE)
  return {name: float(value) for name, value in found}


@pytest.mark.slow
class SoakTest(absltest.TestCase):
  def test_2000_requests_of_200_clients_leave_nothing_behind(self):
    env = {k: v for k, v in os.environ.items() if k != 'XLA_FLAGS'}
    run = subprocess.Popen(
      [sys.executable, '-m', 'tests.serve.soak_server'],
      cwd=_ROOT,
      env=env | {'JAX_PLATFORMS': 'cpu', 'PYTHONPATH': str(_ROOT)},
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
    )
    self.enter_context(run)
    self.addCleanup(run.kill)
    url = run.stdout.readline().strip()
    while httpx.get(url + '/ready').status_code != 200:
      time.sleep(0.5)
    asyncio.run(_soak(url, 500, 'first'))
    before, start = _resident(run.pid), time.monotonic()
    told = asyncio.run(_soak(url, _REQUESTS, 'second'))
    seconds = time.monotonic() - start
    for _ in range(100):
      numbers = _numbers(url)
      if not numbers['requests_under_way']:
        break
      time.sleep(0.1)
    after = _resident(run.pid)
    self.report(told, numbers, seconds, before, after)
    self.assertEmpty(told.wrong)
    self.assertGreater(len(_WRONG), 200)
    self.assertEmpty(told.left_wrong)
    self.assertEqual(numbers['requests_under_way'], 0)
    self.assertEqual(numbers['engine_running'], 0)
    self.assertEqual(numbers['engine_waiting'], 0)
    self.assertEqual(numbers['engine_pages_free'], numbers['engine_pages'])
    self.assertLess(after - before, 48)
    self.assertEqual(httpx.get(url + '/health').status_code, 200)
    run.terminate()
    out, err = run.communicate(timeout=60)
    self.assertEqual((run.returncode, out, err), (0, '', ''))

  def report(self, told, numbers, seconds, before, after):
    spread = lambda values: '  '.join(
      f'p{p} {1000 * np.percentile(values, p):.0f} ms' for p in (50, 90, 99)
    )
    print(f'\n{_CLIENTS} clients, {_REQUESTS} requests, {seconds:.0f} s')
    print(f'first token: {spread(told.first)}')
    print(f'gaps:        {spread(told.gaps)}')
    print(f'memory: {before:.0f} MiB before, {after:.0f} MiB after')
    print(f'{len(_WRONG)} wrong bodies, {len(told.left_wrong)} not sent')
    print(f'tokens: {numbers["completion_tokens_total"]:.0f}')
    for kind, count in sorted(told.kinds.items()):
      print(f'{kind:>12}: {count}')


if __name__ == '__main__':
  absltest.main()
