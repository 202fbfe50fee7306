"""Answers at each address."""

import asyncio
import traceback
from collections.abc import Awaitable, Callable
from importlib import resources
from typing import Any, NamedTuple

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

from deepseek_jax.errors import InputError
from deepseek_jax.infer.dialect import Chat
from deepseek_jax.serve import (
  chat_request,
  completion_request,
  refusals,
  wire,
)
from deepseek_jax.serve.chat_answer import ChatAnswers
from deepseek_jax.serve.completion_answer import Completions
from deepseek_jax.serve.config import Limits
from deepseek_jax.serve.generation import Desk, Generation
from deepseek_jax.serve.guard import SALT
from deepseek_jax.serve.json_fields import Fields
from deepseek_jax.serve.messages import at_message
from deepseek_jax.serve.messages import read as read_messages
from deepseek_jax.serve.meters import CONTENT_TYPE, Meters
from deepseek_jax.serve.requests import check_model
from deepseek_jax.serve.served import Served

_FILES = {
  '/': ('index.html', 'text/html'),
  '/chat.css': ('chat.css', 'text/css'),
  '/chat.js': ('chat.js', 'text/javascript'),
}

Handler = Callable[[Request], Awaitable[Response]]


class Api(NamedTuple):
  """Holds what the routes answer with."""

  served: Served
  desk: Desk
  limits: Limits
  meters: Meters

  def routes(self) -> list[Route]:
    """Returns all routes of the server."""
    get, post = ['GET'], ['POST']
    listed = [
      ('/health', self.health, get),
      ('/ready', self.ready, get),
      ('/metrics', self.metrics, get),
      ('/v1/models', self.models, get),
      ('/v1/models/{name:path}', self.model, get),
      ('/v1/chat/completions', self.chat, post),
      ('/v1/completions', self.completions, post),
      ('/tokenize', self.tokenize, post),
      ('/detokenize', self.detokenize, post),
      ('/tokenizer_info', self.tokenizer_info, get),
    ]
    out = [
      Route(path, _guarded(handler), methods=methods)
      for path, handler, methods in listed
    ]
    return out + [Route(path, _file(*file)) for path, file in _FILES.items()]

  async def health(self, _) -> Response:
    """Answers whether the process works; an engine that broke does not."""
    state = self.desk.loop.state
    return wire.answer({'status': state}, 500 if state == 'broken' else 200)

  async def ready(self, _) -> Response:
    """Answers whether requests are answered now."""
    state = self.desk.loop.state
    return wire.answer({'status': state}, 200 if state == 'ready' else 503)

  async def metrics(self, _) -> Response:
    """Answers the numbers of the server and of its engine."""
    return Response(self.meters.text(), headers={'content-type': CONTENT_TYPE})

  async def models(self, _) -> Response:
    """Answers the list of models, which has one."""
    return wire.answer({'object': 'list', 'data': [self._model()]})

  async def model(self, request: Request) -> Response:
    """Answers about the one model."""
    check_model(request.path_params['name'], self.served)
    return wire.answer(self._model())

  def _model(self) -> dict[str, Any]:
    """Returns what is told about the model."""
    served = self.served
    dialect = served.dialect
    return {
      'id': served.name,
      'object': 'model',
      'created': served.created,
      'owned_by': 'deepseek_jax',
      'max_model_len': served.context,
      'capabilities': {
        'chat': dialect is not None,
        'chat_format': dialect.name if dialect else None,
        'thinking': bool(dialect and dialect.end_of_thinking is not None),
        'tools': bool(dialect and dialect.calls),
        'infilling': bool(served.tokenizer.fim),
        'constrained': served.grammar is not None,
        'max_tokens': min(self.limits.new_tokens, served.context),
      },
    }

  async def chat(self, request: Request) -> Response:
    """Answers in a conversation."""
    asked = await self._read(request, chat_request.read)
    got = await self.desk.open([asked.request], load=asked.common.load)
    writer = ChatAnswers(asked, self.served, got)
    return await self._answer(request, writer, got, asked.common.stream)

  async def completions(self, request: Request) -> Response:
    """Goes on from texts."""
    asked = await self._read(request, completion_request.read)
    got = await self.desk.open(asked.requests, load=asked.common.load)
    writer = Completions(asked, self.served, got)
    return await self._answer(request, writer, got, asked.common.stream)

  async def _read(self, request: Request, read: Callable) -> Any:
    """Returns what a request asks for, read by `read`."""
    self.desk.check()
    body = await wire.read_json(request, self.limits)
    salt = request.scope.get(SALT, '')
    # Long prompts take a while to be cut into tokens.
    return await asyncio.to_thread(read, body, self.served, self.limits, salt)

  async def _answer(
    self,
    request: Request,
    writer: ChatAnswers | Completions,
    got: Generation,
    stream: bool,
  ) -> Response:
    """Returns the answer, whole or as a stream; leaves nothing running."""
    if stream:
      return wire.EventStream(
        writer.chunks(), got.close, self.limits.unread_seconds
      )
    try:
      return await wire.until_gone(request, writer.whole())
    finally:
      got.close()

  async def tokenize(self, request: Request) -> Response:
    """Answers the tokens of a text or of a conversation."""
    body = await wire.read_json(request, self.limits)
    tokens = await asyncio.to_thread(self._tokens, body)
    return wire.answer(
      {
        'tokens': tokens,
        'count': len(tokens),
        'max_model_len': self.served.context,
      }
    )

  def _tokens(self, body: dict[str, Any]) -> list[int]:
    """Returns the tokens of {"prompt"} or {"messages"}."""
    fields = Fields(body)
    check_model(fields.text('model'), self.served)
    around = fields.flag('add_special_tokens', True)
    if fields.has('messages'):
      messages = read_messages(fields, self.limits)
      fields.close()
      if self.served.dialect is None:
        fields.fail('messages', f'{self.served.name} has no chat format')
      try:
        return self.served.dialect.encode(Chat(messages))
      except InputError as error:
        raise at_message(error) from None
    text = fields.text('prompt')
    if text is None:
      fields.fail('prompt', 'is missing; give it or messages')
    fields.close()
    encode = self.served.tokenizer.encode
    # A name alone is a question for the token's id, as harnesses ask it.
    alone = encode(text, special=True)
    ids = alone if len(alone) == 1 else encode(text)
    return self.served.boundaries.around(ids) if around else ids

  async def detokenize(self, request: Request) -> Response:
    """Answers the text of tokens."""
    fields = Fields(await wire.read_json(request, self.limits))
    check_model(fields.text('model'), self.served)
    tokens = fields.items('tokens', self.limits.body)
    if tokens is None:
      fields.fail('tokens', 'is missing')
    fields.close()
    size = self.served.vocab_size
    for token in tokens:
      if type(token) is not int or not 0 <= token < size:
        fields.fail('tokens', f'must be token ids from 0 to {size - 1}')
    text = await asyncio.to_thread(self.served.tokenizer.decode, tokens)
    return wire.answer({'prompt': text})

  async def tokenizer_info(self, _) -> Response:
    """Answers the names of special tokens, as evaluation harnesses ask."""
    tokenizer = self.served.tokenizer
    name = lambda token: None if token is None else tokenizer.decode([token])
    return wire.answer(
      {
        'tokenizer_class': type(tokenizer).__name__,
        'bos_token': name(tokenizer.bos_id),
        'eos_token': name(tokenizer.eos_id),
        'pad_token': name(tokenizer.pad_id),
        'vocab_size': tokenizer.vocab_size,
        'model_max_length': self.served.context,
      }
    )


def _guarded(handler: Handler) -> Handler:
  """Returns a handler whose errors are answers in OpenAI's shape."""

  async def guarded(request: Request) -> Response:
    try:
      return await handler(request)
    except refusals.ApiError as error:
      return wire.answer_error(error)
    except ClientDisconnect:
      return Response(status_code=499)
    except Exception:
      traceback.print_exc()
      return wire.answer_error(refusals.broken('an error of the server'))

  return guarded


def _file(name: str, media_type: str) -> Handler:
  """Returns a handler that answers one of the page's own files."""
  data = resources.files('deepseek_jax.serve').joinpath('static', name)
  content = data.read_bytes()

  async def file(_) -> Response:
    return Response(content, media_type=media_type)

  return file
