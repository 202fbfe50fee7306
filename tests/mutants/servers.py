"""Bugs of servers: doors left open, streams left running, errors swallowed."""

from tests.mutants.mutant import Mutant

_GUARD = 'deepseek_jax/serve/guard.py'
_GUARD_TEST = 'tests/serve/guard_test.py'
_WIRE = 'deepseek_jax/serve/wire.py'
_LOOP = 'deepseek_jax/serve/engine_loop.py'
_STREAMS_TEST = 'tests/serve/streams_test.py'
_CLIENT_TEST = 'tests/serve/client_test.py'

MUTANTS = (
  Mutant(
    'key_for_one_prefix_alone',
    _GUARD,
    "    if scope['path'] in OPEN and scope['method'] in ('GET', 'HEAD'):\n",
    "    if not scope['path'].startswith('/v1'):\n",
    (f'{_GUARD_TEST}::every_route_and_method_needs_the_key',),
    'vllm 58144, 29922: routes beside /v1 answered without the key',
  ),
  Mutant(
    'any_host_is_ours',
    _GUARD,
    "    name = re.sub(r':\\d+$', '', given[0].lower())\n",
    '    return True\n',
    (f'{_GUARD_TEST}::an_open_server_answers_to_names',),
    'DNS rebinding: a page elsewhere reads a server of this machine',
  ),
  Mutant(
    'cut_stream_runs_on',
    _WIRE,
    '      await self._events.aclose()\n      self._close()\n',
    '      await self._events.aclose()\n',
    (f'{_STREAMS_TEST}::of_100_streams_that_are_cut',),
    'Rapid-MLX 1469 and others: rows of clients that left are never freed',
  ),
  Mutant(
    'failed_stream_ends_well',
    _WIRE,
    "        await write(b'data: ' + to_json(error.body()) + b'\\n\\n')\n",
    "        await write(b'data: [DONE]\\n\\n')\n",
    (f'{_STREAMS_TEST}::one_request_fails_and_others_go_on',),
    'openai clients take a failed answer for a short one',
  ),
  Mutant(
    'slow_reader_holds_all',
    _LOOP,
    '    if len(self._items) > self._held:\n',
    '    if len(self._items) < 0:\n',
    (f'{_STREAMS_TEST}::a_slow_reader_is_ended',),
    'what nobody reads is kept until memory is full',
  ),
  Mutant(
    'unread_stream_keeps_its_place',
    _WIRE,
    'asyncio.timeout(self._patience)',
    'asyncio.timeout(None)',
    (f'{_STREAMS_TEST}::a_client_that_reads_nothing',),
    'clients that read nothing fill a server until it takes no one in',
  ),
  Mutant(
    'others_prompts_taken_half',
    _LOOP,
    '        self._forget(number)\n        self.engine.cancel(number)\n'
    '      answer = (\n',
    '        self._forget(number)\n      answer = (\n',
    (f'{_STREAMS_TEST}::of_prompts_that_do_not_all_fit',),
    'a refused request leaves its first prompts running',
  ),
  Mutant(
    'partial_characters_without_bytes',
    'deepseek_jax/serve/served.py',
    '    if data is not None:\n',
    '    if data is None:\n',
    (f'{_CLIENT_TEST}::log_probabilities_join',),
    'OpenAI: bytes are there for characters of several tokens',
  ),
  Mutant(
    'one_salt_for_all_keys',
    'deepseek_jax/serve/routes.py',
    "    salt = request.scope.get(SALT, '')\n",
    "    salt = ''\n",
    (f'{_GUARD_TEST}::keys_share_no_prefixes',),
    'a shared prefix cache tells one user of the prompts of another',
  ),
  Mutant(
    'template_reads_users_marks',
    'deepseek_jax/infer/format_dialect.py',
    "  names |= {token['content'] for token in _added(tokenizer)}\n",
    '',
    ('tests/infer/dialect_test.py::never_becomes_a_special_token',),
    'a user who spells <|assistant|> speaks for the model',
  ),
)
