"""Scores answers: the child process of `deepseek_jax.rl.judge`.

A request is a line of JSON {'text', 'problem'} and a reply one of {'scores'},
or {'error'}. The first line of all holds the rewards.
"""

import json
import os
import sys
from typing import TextIO

from deepseek_jax.rl.grading import rewards


def answer(line: str, made: tuple[rewards.Reward, ...]) -> dict:
  """Returns the reply to a request; what a verifier raises becomes an error."""
  request = json.loads(line)
  scores = []
  for reward in made:
    try:
      if reward.applies(request['problem']):
        rewards.check([reward], request['problem'], 'the problem')
      scores.append(reward(request['text'], request['problem']))
    except BaseException as error:
      told = ' '.join(str(error).split())[:300]
      return {'error': f'{reward.kind}: {type(error).__name__}: {told}'}
  return {'scores': scores}


def serve(requests: TextIO, replies: TextIO) -> None:
  """Replies to requests until they end."""
  made = rewards.read(json.loads(requests.readline()), 'rewards')
  print(json.dumps({'ready': len(made)}), file=replies, flush=True)
  for line in requests:
    print(json.dumps(answer(line, made)), file=replies, flush=True)


def limit_memory(mebibytes: int) -> None:
  """Limits the memory of this process, where the system can."""
  try:
    import resource
  except ImportError:
    return
  size = mebibytes << 20
  resource.setrlimit(resource.RLIMIT_AS, (size, size))


def main(mebibytes: int) -> None:
  """Runs the process; what a verifier prints goes to stderr."""
  limit_memory(mebibytes)
  # Also what is written past Python, by a library in C.
  replies = open(os.dup(1), 'w', encoding='utf-8')  # noqa: SIM115
  os.dup2(2, 1)
  serve(sys.stdin, replies)
