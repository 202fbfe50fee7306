"""Stands before all routes: nothing passes that was not let in.

A route that is added later is closed until its path is named here.
"""

import re
import time
import uuid
from collections.abc import Callable

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from deepseek_jax.serve import refusals, wire
from deepseek_jax.serve.config import ServeConfig, is_loopback, key_of
from deepseek_jax.serve.meters import Meters

# Answer without a key, to GET and HEAD: no word of a model or a user.
OPEN = frozenset({'/', '/health', '/ready', '/chat.css', '/chat.js'})
SALT = 'deepseek_jax.salt'  # in the scope: of the key that asks
_SILENT = ('/health', '/ready', '/metrics')  # programs look there all the time
_ID = re.compile(r'[A-Za-z0-9._-]{1,128}')
_HEADERS = {
  'content-security-policy': (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src"
    " 'self'; img-src 'self' data:; base-uri 'none'; form-action 'none';"
    " frame-ancestors 'none'"
  ),
  'x-content-type-options': 'nosniff',
  'x-frame-options': 'DENY',
  'referrer-policy': 'no-referrer',
  'cross-origin-resource-policy': 'same-origin',
  'cache-control': 'no-store',
}


class Guard:
  """Checks host and key, names requests, counts and tells of answers."""

  def __init__(
    self,
    app: ASGIApp,
    config: ServeConfig,
    meters: Meters,
    routes: frozenset[str],
    log: Callable[[str], object],
  ):
    """Wraps an application.

    Args:
      app: what answers.
      config: who may ask.
      meters: counts.
      routes: paths by name; all others are counted as one.
      log: takes a line for each answer, without a word of the request's body.
    """
    self._app, self._config, self._meters = app, config, meters
    self._routes, self._log = routes, log

  async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
    """Answers a request, or passes it on."""
    if scope['type'] == 'lifespan':
      await self._app(scope, receive, send)
      return
    if scope['type'] != 'http':
      await send({'type': 'websocket.close', 'code': 1008})
      return
    headers, start, status = Headers(scope=scope), time.monotonic(), 500
    number = headers.get('x-request-id', '')
    if not _ID.fullmatch(number):
      number = uuid.uuid4().hex

    async def named(message: Message) -> None:
      nonlocal status
      if message['type'] == 'http.response.start':
        status = message['status']
        out = MutableHeaders(scope=message)
        out['x-request-id'] = number
        for name, value in _HEADERS.items():
          out.setdefault(name, value)
      await send(message)

    try:
      refusal = self._refusal(scope, headers)
      app = self._app if refusal is None else refusal
      await app(scope, receive, named)
    finally:
      route = scope['path'] if scope['path'] in self._routes else 'other'
      self._meters.answered(route, status)
      seconds = time.monotonic() - start
      method = scope['method'] if scope['method'].isalpha() else '?'
      if route not in _SILENT:
        self._log(f'{number} {method[:8]} {route} {status} {seconds:.3f} s')

  def _refusal(self, scope: Scope, headers: Headers) -> Response | None:
    """Returns why a request may not pass, or None."""
    if not self._knows_host(headers.getlist('host')):
      return wire.answer_error(
        refusals.ApiError(
          403,
          'host: this server goes by another name; add it by --allow_host=NAME',
          code='unknown_host',
        )
      )
    if not self._config.keys:
      return None
    if scope['path'] in OPEN and scope['method'] in ('GET', 'HEAD'):
      return None
    scheme, _, given = headers.get('authorization', '').partition(' ')
    name = None
    if scheme.lower() == 'bearer':
      name = key_of(given.strip().encode('latin-1'), self._config.keys)
    if name is None:
      return wire.answer_error(
        refusals.ApiError(
          401,
          'this server needs a key: send Authorization: Bearer KEY',
          code='invalid_api_key',
          headers={'www-authenticate': 'Bearer'},
        )
      )
    scope[SALT] = name
    return None

  def _knows_host(self, given: list[str]) -> bool:
    """Returns whether a request is meant for this server.

    A page elsewhere can have a name of its own point here (DNS rebinding): an
    open server answers to names of this machine alone.
    """
    if self._config.keys:
      return True
    if len(given) != 1:
      return False
    name = re.sub(r':\d+$', '', given[0].lower())
    return is_loopback(name) or name in self._config.hosts
