"""Plays benchmarks.kernel_stage: prints the rows that a test has written down.

python fake_stage.py SCRIPT.json LOG '{"stage": ..., "op": ...}'
"""

import json
import os
import sys
import time


def main(script: str, log: str, argument: str) -> None:
  asked = json.loads(argument)
  if asked['stage'] == 'time':
    print('{"ready": true}', flush=True)
    if not sys.stdin.readline():
      return
  with open(log, 'a') as file:
    file.write(json.dumps(asked) + '\n')
  with open(script) as file:
    told = json.load(file)
  name = f'{asked["stage"]} {asked.get("op", "")}'.strip()
  for step in told.get(name, told[asked['stage']]):
    if step == 'hang':
      time.sleep(600)
    elif step == 'crash':
      print('CUDA_ERROR_ILLEGAL_ADDRESS', file=sys.stderr, flush=True)
      os.abort()
    elif isinstance(step, str):
      print(step, flush=True)
    else:
      print(json.dumps(step), flush=True)


if __name__ == '__main__':
  main(*sys.argv[1:])
