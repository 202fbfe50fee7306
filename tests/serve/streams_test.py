"""Streams that are cut, slow, late or refused: nothing is left behind."""

import json
import threading
import time

import httpx2 as httpx
from absl.testing import absltest, parameterized

from deepseek_jax.serve.config import Limits
from tests.serve import served as servers
from tests.serve.fake_engine import FakeEngine

_EOS = servers.BYTES.eos_id
_LONG = {'prompt': 'abc', 'max_tokens': 200}


def _engine(**fields):
  return FakeEngine(servers.BYTES, stop=_EOS, **fields)


def _endless(engine):
  engine.script = lambda request, index: [servers.BYTES.encode('x')[0]] * 10_000
  return engine


def _idle(server, engine, seconds=10):
  """Returns whether nothing runs, soon."""
  desk, end = server.app.state.desk, time.monotonic() + seconds
  while time.monotonic() < end:
    if not engine.busy() and not desk.under_way and not server.loop._running:
      return True
    time.sleep(0.01)
  return False


def _events(response):
  """Returns the JSON of a stream's events, and its last word."""
  lines = [l for l in response.iter_lines() if l.startswith('data: ')]
  last = lines.pop() if lines and lines[-1] == 'data: [DONE]' else None
  return [json.loads(line[6:]) for line in lines], last


class CancelTest(parameterized.TestCase):
  @parameterized.parameters('/v1/completions', '/v1/chat/completions')
  def test_of_100_streams_that_are_cut_nothing_is_left(self, path):
    if 'chat' in path:
      tokenizer = servers.deepseek_tokenizer()
      served = servers.served_chat(tokenizer)
      engine = FakeEngine(tokenizer, context=4096, stop=tokenizer.eos_id)
      body = {'messages': [{'role': 'user', 'content': 'hi'}]}
    else:
      served, engine = servers.served_bytes(), _engine()
      body = _LONG
    _endless(engine).pace = 0.001
    with servers.running(served, engine) as (server, _):
      free = engine.stats['pages_free']
      client = self.enter_context(httpx.Client())

      def cut(number):
        with client.stream(
          'POST', server.url + path, json={**body, 'stream': True}
        ) as response:
          lines = response.iter_lines()
          for _ in range(number % 4):
            next(lines)

      for first in range(0, 100, 10):
        threads = [
          threading.Thread(target=cut, args=(n,))
          for n in range(first, first + 10)
        ]
        for thread in threads:
          thread.start()
        for thread in threads:
          thread.join()
      self.assertTrue(_idle(server, engine))
      self.assertLen(engine.seen, 100)
      self.assertEqual(engine.stats['pages_free'], free)
      self.assertEmpty(server.loop._ids)
      self.assertEmpty(server.loop._left)

  def test_a_client_that_leaves_before_a_whole_answer_ends_it(self):
    engine = _endless(_engine())
    engine.hold.set()  # it would wait for ever
    with servers.running(servers.served_bytes(), engine) as (server, _):
      with self.assertRaises(httpx.ReadTimeout):
        httpx.post(server.url + '/v1/completions', json=_LONG, timeout=0.3)
      self.assertTrue(_idle(server, engine))

  def test_a_stop_text_of_a_chat_ends_what_runs(self):
    tokenizer = servers.deepseek_tokenizer()
    engine = FakeEngine(tokenizer, context=4096, stop=tokenizer.eos_id)
    engine.script = lambda request, index: tokenizer.encode('ab. ' * 500)
    with servers.running(servers.served_chat(tokenizer), engine) as (server, _):
      for stream in (False, True):
        body = {
          'messages': [{'role': 'user', 'content': 'hi'}],
          'thinking': {'type': 'disabled'},
          'stop': ['. '],
          'stream': stream,
          'expert_load': True,
        }
        response = httpx.post(server.url + '/v1/chat/completions', json=body)
        if stream:
          events, last = _events(response)
          self.assertEqual(last, 'data: [DONE]')
          text = ''.join(
            e['choices'][0]['delta'].get('content') or ''
            for e in events
            if e['choices']
          )
          answer = events[-1]
        else:
          answer = response.json()
          text = answer['choices'][0]['message']['content']
          self.assertEqual(answer['choices'][0]['finish_reason'], 'stop')
          self.assertLess(answer['usage']['completion_tokens'], 50)
          self.assertEqual(answer['usage']['prompt_cache_hit_tokens'], 1)
        self.assertEqual(text, 'ab')
        self.assertEqual(
          answer['expert_load'],
          {'layers': 2, 'experts': 3, 'counts': [[0, 1, 2], [3, 4, 5]]},
        )
      self.assertTrue(_idle(server, engine))

  @parameterized.product(stream=(False, True), at_once=(1, 7))
  def test_what_comes_behind_a_stop_text_counts_nowhere(self, stream, at_once):
    tokenizer = servers.deepseek_tokenizer()
    engine = FakeEngine(tokenizer, context=4096, stop=tokenizer.eos_id)
    engine.at_once = at_once
    says = [tokenizer.encode(text) for text in ('ab. ' * 500, 'abc' * 50)]
    engine.script = lambda request, index: says[index]
    ended = lambda n: '. ' in tokenizer.decode(says[0][:n])
    first = next(n for n in range(len(says[0])) if ended(n))
    body = {
      'messages': [{'role': 'user', 'content': 'hi'}],
      'thinking': {'type': 'disabled'},
      'stop': ['. '],
      'n': 2,
      'stream': stream,
      **({'stream_options': {'include_usage': True}} if stream else {}),
    }
    with servers.running(servers.served_chat(tokenizer), engine) as (server, _):
      response = httpx.post(server.url + '/v1/chat/completions', json=body)
    found = _events(response)[0][-1] if stream else response.json()
    wanted = first + len(says[1]) + 1  # and the token that ends it
    self.assertEqual(found['usage']['completion_tokens'], wanted)
    self.assertEqual(
      found['usage']['total_tokens'], found['usage']['prompt_tokens'] + wanted
    )


class LimitTest(absltest.TestCase):
  def test_a_full_queue_says_when_to_come_again(self):
    engine = _engine(slots=1, queue=2)
    engine.hold.set()
    limits = Limits(requests=3)
    with servers.running(servers.served_bytes(), engine, limits=limits) as (
      server,
      _,
    ):
      post = lambda n=1: httpx.post(
        server.url + '/v1/completions', json=_LONG | {'n': n}, timeout=20
      )
      full = post(n=3)  # the engine's queue
      self.assertEqual(full.status_code, 429)
      self.assertIn('queue', full.json()['error']['message'])
      threads = [threading.Thread(target=post) for _ in range(3)]
      for thread in threads:
        thread.start()
        while server.app.state.desk.under_way < threads.index(thread) + 1:
          time.sleep(0.005)
      full = post()  # the server's own limit
      self.assertEqual(full.status_code, 429)
      self.assertGreaterEqual(int(full.headers['retry-after']), 1)
      self.assertEqual(full.json()['error']['type'], 'rate_limit_error')
      engine.hold.clear()
      for thread in threads:
        thread.join()
      self.assertEqual(post().status_code, 200)

  def test_of_prompts_that_do_not_all_fit_none_is_taken(self):
    engine = _engine(slots=1, queue=3)
    engine.hold.set()  # what is taken would not end by itself
    with servers.running(servers.served_bytes(), engine) as (server, _):
      url, body = server.url + '/v1/completions', _LONG | {'prompt': ['a'] * 5}
      self.assertEqual(httpx.post(url, json=body).status_code, 429)
      self.assertTrue(_idle(server, engine))
      engine.hold.clear()
      self.assertEqual(httpx.post(url, json=_LONG).status_code, 200)

  def test_a_deadline_ends_an_answer(self):
    engine = _endless(_engine())
    engine.hold.set()
    limits = Limits(seconds=0.2)
    with servers.running(servers.served_bytes(), engine, limits=limits) as (
      server,
      _,
    ):
      url = server.url + '/v1/completions'
      whole = httpx.post(url, json=_LONG)
      self.assertEqual(whole.status_code, 504)
      # Clients of OpenAI's would ask twice more.
      self.assertEqual(whole.headers['x-should-retry'], 'false')
      events, last = _events(httpx.post(url, json=_LONG | {'stream': True}))
      self.assertEqual(events[-1]['error']['code'], 'deadline_exceeded')
      self.assertIsNone(last)
      self.assertTrue(_idle(server, engine))

  def test_a_slow_reader_is_ended_and_others_are_not(self):
    engine = _engine(context=3_000_000)
    served = servers.served_bytes(context=3_000_000)
    _endless(engine)
    engine.script = lambda r, i: (
      [200] * (1_000_000 if r.max_new_tokens > 1000 else 50)
    )
    limits = Limits(held=50, new_tokens=2_000_000)
    with servers.running(served, engine, limits=limits) as (server, _):
      body = json.dumps(_LONG | {'max_tokens': 1_000_000, 'stream': True})
      with servers.connect(server.url) as wire:
        wire.sendall(
          'POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type:'
          f' application/json\r\ncontent-length: {len(body)}\r\n\r\n'.encode()
          + body.encode()
        )
        url = server.url + '/v1/completions'
        quick = httpx.post(url, json=_LONG | {'max_tokens': 50})
        self.assertLen(quick.json()['choices'][0]['text'], 50)
        end = time.monotonic() + 25
        while engine.busy() and time.monotonic() < end:
          time.sleep(0.05)
        self.assertFalse(engine.busy())
        parts, got = iter(lambda: wire.recv(1 << 20), b''), b''
        for part in parts:
          got = got[-1000:] + part
          if b'slow_reader' in got:
            break
        self.assertIn(b'"code":"slow_reader"', got)
        self.assertNotIn(b'[DONE]', got)
      self.assertTrue(_idle(server, engine))

  def test_a_client_that_reads_nothing_loses_its_place(self):
    engine = _engine(context=3_000_000)
    engine.script = lambda request, index: [200] * 1_000_000
    engine.pace = 0.0002  # what is held back lies in the sockets first
    served = servers.served_bytes(context=3_000_000)
    limits = Limits(held=500, new_tokens=2_000_000, unread_seconds=0.5)
    with servers.running(served, engine, limits=limits) as (server, _):
      body = json.dumps(_LONG | {'max_tokens': 1_000_000, 'stream': True})
      with servers.connect(server.url, buffer=4096) as wire:
        wire.sendall(
          'POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type:'
          f' application/json\r\ncontent-length: {len(body)}\r\n\r\n'.encode()
          + body.encode()
        )
        while not engine.busy():
          time.sleep(0.01)
        self.assertTrue(_idle(server, engine, 20))

  def test_connections_that_send_no_request_are_closed(self):
    limits = Limits(header_seconds=0.3, body_seconds=0.3)
    with servers.running(servers.served_bytes(), limits=limits) as (server, _):
      start = time.monotonic()
      for text in ('', 'GET /health HT', 'GET /health HTTP/1.1\r\nhost: x\r\n'):
        self.assertEqual(servers.raw(server.url, text), '')
      slow = servers.raw(
        server.url,
        'POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type:'
        ' application/json\r\ncontent-length: 100\r\n\r\n{"prompt',
      )
      self.assertIn('HTTP/1.1 408', slow)
      with servers.connect(server.url) as wire:
        head = b'GET /health HTTP/1.1\r\nhost: localhost\r\n'
        wire.sendall(head + b'\r\n')
        self.assertIn(b'200 OK', wire.recv(1 << 16))
        wire.sendall(head)  # the next one is cut
        self.assertEqual(wire.recv(1 << 16), b'')
      self.assertLess(time.monotonic() - start, 10)


class FailureTest(absltest.TestCase):
  def test_one_request_fails_and_others_go_on(self):
    engine = _engine()
    engine.nan = servers.BYTES.encode('!')[0]
    with servers.running(servers.served_bytes(), engine) as (server, _):
      url = server.url + '/v1/completions'
      body = {'prompt': '!'}
      bad = httpx.post(url, json=body)
      self.assertEqual(bad.status_code, 500)
      self.assertIn('NaN', bad.json()['error']['message'])
      self.assertEqual(bad.headers['x-should-retry'], 'false')
      events, last = _events(
        httpx.post(url, json={'prompt': '!', 'stream': True})
      )
      self.assertIn('NaN', json.dumps(events))
      self.assertIn('error', events[-1])
      self.assertIsNone(last)
      self.assertEqual(httpx.post(url, json=_LONG).status_code, 200)
      self.assertTrue(_idle(server, engine))

  def test_an_engine_that_breaks_ends_all_and_health_tells(self):
    engine = _endless(_engine())
    with servers.running(servers.served_bytes(), engine) as (server, _):
      url, errors = server.url + '/v1/completions', []

      def ask():
        events, _ = _events(httpx.post(url, json=_LONG | {'stream': True}))
        errors.append(events[-1]['error'])

      engine.hold.set()
      threads = [threading.Thread(target=ask) for _ in range(3)]
      for thread in threads:
        thread.start()
      while len(server.loop._running) < 3:
        time.sleep(0.005)
      engine.fails = RuntimeError('planted')
      for thread in threads:
        thread.join()
      for error in errors:
        self.assertIn('broken', error['message'])
        self.assertNotIn('planted', error['message'])
      self.assertEqual(httpx.get(server.url + '/health').status_code, 500)
      self.assertEqual(httpx.get(server.url + '/ready').status_code, 503)
      refused = httpx.post(url, json=_LONG)
      self.assertEqual(refused.status_code, 503)
      self.assertEqual(refused.json()['error']['code'], 'not_ready')

  def test_one_thread_alone_calls_the_engine(self):
    engine = _engine()
    with servers.running(servers.served_bytes(), engine) as (server, _):
      for _ in range(3):
        httpx.post(server.url + '/v1/completions', json=_LONG)
    self.assertLen(engine.threads, 1)

  def test_a_server_that_stops_ends_its_streams(self):
    engine = _endless(_engine())
    with servers.running(servers.served_bytes(), engine) as (server, _):
      with (
        httpx.Client() as client,
        client.stream(
          'POST', server.url + '/v1/completions', json=_LONG | {'stream': True}
        ) as response,
      ):
        lines = response.iter_lines()
        next(lines)
        server.loop.stop()
        text = ''.join(lines)
      self.assertIn('"error"', text)


if __name__ == '__main__':
  absltest.main()
