"""Is a training step as fast as transformers'? And prefill?

python -m benchmarks.train [--rounds=7] [--python=OTHER_PYTHON]
"""

from benchmarks import contest

_TOKENS = contest.BATCH * contest.LENGTH

if __name__ == '__main__':
  contest.main(
    'train',
    [
      ('train', contest.BATCH, _TOKENS),
      ('prefill', contest.BATCH, _TOKENS),
    ],
  )
