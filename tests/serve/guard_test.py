"""Who is let in, from where, and what every answer carries."""

import tempfile
from pathlib import Path

import httpx2 as httpx
from absl.testing import absltest, parameterized

from deepseek_jax.errors import InputError
from deepseek_jax.serve import guard
from deepseek_jax.serve.config import (
  KEY_VARIABLE,
  Limits,
  ServeConfig,
  read_keys,
)
from deepseek_jax.serve.process import listen
from tests.serve import served as servers

KEY, OTHER = servers.KEY, 'z' * 40
_WITH = {'authorization': f'Bearer {KEY}'}
_METHODS = ('GET', 'POST', 'PUT', 'DELETE', 'PATCH', 'OPTIONS', 'HEAD', 'FOO')


class KeyTest(parameterized.TestCase):
  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    cls.lines = []
    cls.server, cls.engine = cls.enterClassContext(
      servers.running(
        servers.served_bytes(), keys=(KEY, OTHER), log=cls.lines.append
      )
    )
    cls.client = cls.enterClassContext(httpx.Client(base_url=cls.server.url))

  def paths(self):
    for route in self.server.app.routes:
      yield route.path.replace('{name:path}', 'tiny')

  def test_every_route_and_method_needs_the_key_but_the_open_ones(self):
    self.assertGreater(len(list(self.paths())), 10)
    wrong = {}
    for path in [*self.paths(), '/nothing', '/docs', '/openapi.json']:
      for method in _METHODS:
        response = self.client.request(method, path)
        is_open = path in guard.OPEN and method in ('GET', 'HEAD')
        closed = response.status_code == 401
        if not is_open and method != 'HEAD':
          closed = closed and 'invalid_api_key' in response.text
        if closed == is_open:
          wrong[method, path] = response.status_code
    self.assertEqual(wrong, {})

  def test_the_open_ones_are_few_and_tell_nothing(self):
    self.assertEqual(
      guard.OPEN, {'/', '/health', '/ready', '/chat.css', '/chat.js'}
    )
    for path in guard.OPEN:
      self.assertNotIn('tiny', self.client.get(path).text)

  @parameterized.parameters(
    '//health',
    '/health/',
    '/health/../metrics',
    '/%68ealth/..;/metrics',
    '/health%2f..%2fmetrics',
    '/health;/../metrics',
    '/HEALTH',
    '/chat.js/../v1/models',
    '/%2e%2e/v1/models',
    '/metrics#/health',
    '/metrics?/health',
  )
  def test_no_spelling_of_a_path_gets_around_it(self, path):
    answer = servers.raw(
      self.server.url,
      f'GET {path} HTTP/1.1\r\nhost: 127.0.0.1\r\nconnection: close\r\n\r\n',
    )
    self.assertRegex(answer, r'^HTTP/1.1 (401|404|400) ')
    self.assertNotIn('deepseek_jax_', answer)

  @parameterized.parameters(
    '',
    'Bearer',
    f'Bearer {KEY[:-1]}',
    f'Bearer {KEY}x',
    f'Bearer {KEY.upper()}',
    f'Basic {KEY}',
    KEY,
    f'Bearer {KEY},{KEY}',
    'Bearer é',
    f'Bearer {KEY}\t{KEY}',
  )
  def test_a_wrong_key_is_refused(self, value):
    response = self.client.get(
      '/v1/models', headers={'authorization': value.encode('latin-1')}
    )
    self.assertEqual(response.status_code, 401)

  @parameterized.parameters(KEY, OTHER)
  def test_each_key_opens_it(self, key):
    for scheme in ('Bearer', 'bearer'):
      headers = {'authorization': f'{scheme} {key}'}
      response = self.client.get('/v1/models', headers=headers)
      self.assertEqual(response.status_code, 200)

  def test_a_key_in_the_address_is_none(self):
    response = self.client.get(f'/v1/models?key={KEY}&api_key={KEY}')
    self.assertEqual(response.status_code, 401)

  def test_keys_share_no_prefixes_and_salts_tell_no_key(self):
    for key in (KEY, OTHER):
      headers = {'authorization': f'Bearer {key}'}
      for salt in ('', 'team'):
        body = {'prompt': 'abc', 'cache_salt': salt}
        self.client.post('/v1/completions', json=body, headers=headers)
    salts = [request.salt for request in self.engine.seen[-4:]]
    self.assertLen(set(salts), 4)
    self.assertNotIn(KEY, ''.join(salts))

  def test_prompts_and_keys_are_not_logged(self):
    self.client.post(
      '/v1/completions?secret=1', json={'prompt': 'hush'}, headers=_WITH
    )
    self.client.get('/a%0d%0ab/hush', headers=_WITH)
    told = '\n'.join(self.lines)
    self.assertIn('/v1/completions 200', told)
    self.assertIn('other 404', told)
    for secret in ('hush', 'secret', KEY):
      self.assertNotIn(secret, told)

  def test_errors_of_routing_have_openais_shape(self):
    for path, method, status in (
      ('/nothing', 'GET', 404),
      ('/v1/completions', 'GET', 405),
      ('/v1/models/other', 'GET', 404),
      ('/health', 'POST', 405),
    ):
      response = self.client.request(method, path, headers=_WITH)
      self.assertEqual(response.status_code, status)
      self.assertIn('message', response.json()['error'])

  @parameterized.parameters('a' * 128, 'req-1.2_3')
  def test_an_id_of_a_request_comes_back(self, number):
    response = self.client.get('/health', headers={'x-request-id': number})
    self.assertEqual(response.headers['x-request-id'], number)

  @parameterized.parameters('', 'a' * 129, 'a b', '<b>', 'é')
  def test_an_id_that_is_none_is_replaced(self, number):
    response = self.client.get(
      '/health', headers={'x-request-id': number.encode('latin-1')}
    )
    self.assertRegex(response.headers['x-request-id'], '^[0-9a-f]{32}$')

  def test_every_answer_has_the_headers_of_a_closed_page(self):
    for path in (*guard.OPEN, '/v1/models', '/nothing'):
      headers = self.client.get(path).headers
      policy = headers['content-security-policy']
      self.assertIn("default-src 'none'", policy)
      self.assertNotIn('unsafe', policy)
      self.assertEqual(headers['x-content-type-options'], 'nosniff')
      self.assertNotIn('access-control-allow-origin', headers)
      self.assertNotIn('server', headers)

  def test_metrics_count_answers(self):
    self.client.post('/v1/completions', json={'prompt': 'x'}, headers=_WITH)
    text = self.client.get('/metrics', headers=_WITH).text
    for name in (
      'http_requests_total{route="/v1/completions",status="200"}',
      'completion_tokens_total',
      'prompt_tokens_total',
      'first_token_seconds_bucket',
      'engine_pages_free',
      'requests_under_way 0.0',
    ):
      self.assertIn(f'deepseek_jax_{name}', text)


class HostTest(parameterized.TestCase):
  @parameterized.parameters(
    ('127.0.0.1', 200),
    ('localhost', 200),
    ('localhost:8000', 200),
    ('[::1]:8000', 200),
    ('mine.example', 200),
    ('evil.example', 403),
    ('127.0.0.1.evil.example', 403),
    ('localhost.evil.example:80', 403),
    ('', 403),
  )
  def test_an_open_server_answers_to_names_of_this_machine(self, host, status):
    # A name of a page elsewhere may be pointed here: DNS rebinding.
    if not hasattr(HostTest, 'server'):
      HostTest.server, _ = self.enterClassContext(
        servers.running(servers.served_bytes(), hosts=('mine.example',))
      )
    response = httpx.get(self.server.url + '/v1/models', headers={'host': host})
    self.assertEqual(response.status_code, status)

  def test_other_origins_may_ask_only_if_named(self):
    ask = {
      'origin': 'https://a.example',
      'access-control-request-method': 'POST',
      'access-control-request-headers': 'authorization,content-type',
    }
    allow = 'access-control-allow-origin'
    with servers.running(
      servers.served_bytes(), keys=(KEY,), origins=('https://a.example',)
    ) as (server, _):
      url = server.url + '/v1/completions'
      found = httpx.options(url, headers=ask)
      self.assertEqual(found.headers[allow], 'https://a.example')
      answer = httpx.post(url, headers=ask, json={'prompt': 'x'})
      self.assertEqual(answer.status_code, 401)
      ask['origin'] = 'https://b.example'
      self.assertNotIn(allow, httpx.options(url, headers=ask).headers)


class ConfigTest(parameterized.TestCase):
  @parameterized.parameters(
    '0.0.0.0', '::', '192.168.1.2', 'example.com', '', '127.0.0.1.evil.com'
  )
  def test_another_host_needs_a_key(self, host):
    with self.assertRaisesRegex(InputError, 'needs a key'):
      ServeConfig(host=host)
    ServeConfig(host=host, keys=(KEY,))

  @parameterized.parameters('127.0.0.1', '127.3.2.1', '::1', 'localhost')
  def test_this_machine_needs_none(self, host):
    ServeConfig(host=host)

  @parameterized.parameters(
    ({'port': -1}, '--port=-1'),
    ({'port': 65536}, '--port=65536'),
    ({'keys': ('short',)}, 'at least 16'),
    ({'keys': ('é' * 20,)}, 'ASCII'),
    ({'keys': ('a b' * 9,)}, 'without blanks'),
    ({'origins': ('*',)}, r'allow_origin=\*'),
    ({'origins': ('https://*',)}, 'allow_origin'),
    ({'origins': ('a.example',)}, 'allow_origin'),
  )
  def test_what_would_leave_it_open_is_refused(self, fields, words):
    with self.assertRaisesRegex(InputError, words):
      ServeConfig(**fields)

  @parameterized.parameters('body', 'answers', 'requests', 'held')
  def test_a_limit_that_lets_nothing_through_is_refused(self, name):
    for value in (0, -1, 1.5, True, None, float('nan')):
      with self.assertRaisesRegex(InputError, f'limits.{name}'):
        Limits(**{name: value})

  def test_keys_come_from_a_file_or_the_environment(self):
    folder = Path(self.enter_context(tempfile.TemporaryDirectory()))
    path = folder / 'keys'
    path.write_text(f'{KEY}\n\n  {OTHER}  \n')
    self.assertEqual(read_keys(str(path)), (KEY, OTHER))
    with absltest.mock.patch.dict('os.environ', {KEY_VARIABLE: OTHER}):
      self.assertEqual(read_keys(None), (OTHER,))
      self.assertEqual(read_keys(str(path)), (KEY, OTHER))
    with absltest.mock.patch.dict('os.environ', clear=True):
      self.assertEqual(read_keys(None), ())
    empty = absltest.mock.patch.dict('os.environ', {KEY_VARIABLE: ''})
    with empty, self.assertRaisesRegex(InputError, '0 characters'):
      read_keys(None)
    path.write_text('\n')
    with self.assertRaisesRegex(InputError, 'holds no key'):
      read_keys(str(path))
    for wrong in (folder, folder / 'none'):
      with self.assertRaisesRegex(InputError, '--api_key_file'):
        read_keys(str(wrong))

  def test_a_taken_port_is_one_clear_line(self):
    with servers.running(servers.served_bytes()) as (server, _):
      port = int(server.url.rpartition(':')[2])
      with self.assertRaisesRegex(InputError, f'--port={port}: cannot listen'):
        listen(ServeConfig(port=port))


if __name__ == '__main__':
  absltest.main()
