"""Puts the server together: routes, guard, and what is said when none fits."""

from collections.abc import Callable

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response

from deepseek_jax.serve import refusals, wire
from deepseek_jax.serve.config import ServeConfig
from deepseek_jax.serve.engine_loop import EngineLoop
from deepseek_jax.serve.generation import Desk
from deepseek_jax.serve.guard import Guard
from deepseek_jax.serve.meters import Meters
from deepseek_jax.serve.routes import Api
from deepseek_jax.serve.served import Served


def build(
  served: Served,
  loop: EngineLoop,
  config: ServeConfig,
  *,
  log: Callable[[str], object] = lambda line: None,
) -> Starlette:
  """Returns the server as an ASGI application.

  Args:
    served: the model.
    loop: runs its engine on another thread.
    config: who may ask, and how much.
    log: takes a line for each answer.
  """
  meters = Meters()
  loop.on_step = meters.engine_stats
  desk = Desk(loop, config.limits, meters)
  routes = Api(served, desk, config.limits, meters).routes()
  known = frozenset(route.path for route in routes)
  middleware = [
    Middleware(Guard, config=config, meters=meters, routes=known, log=log)
  ]
  if config.origins:
    # Outside the guard: browsers ask for leave without a key.
    cors = Middleware(
      CORSMiddleware,
      allow_origins=config.origins,
      allow_methods=['GET', 'POST'],
      allow_headers=['authorization', 'content-type', 'x-request-id'],
      expose_headers=['x-request-id', 'retry-after'],
    )
    middleware.insert(0, cors)
  app = Starlette(
    routes=routes,
    middleware=middleware,
    exception_handlers={HTTPException: _unrouted},
  )
  app.router.redirect_slashes = False
  app.state.desk = desk
  return app


async def _unrouted(request: Request, error: HTTPException) -> Response:
  """Answers where no route fits, in OpenAI's shape."""
  if error.status_code == 404:
    message, code = 'there is nothing at this address', 'not_found'
  else:
    allowed = (error.headers or {}).get('Allow', '')
    message, code = f'{request.method}: use {allowed}', 'method_not_allowed'
  return wire.answer_error(
    refusals.ApiError(
      error.status_code, message, code=code, headers=error.headers
    )
  )
