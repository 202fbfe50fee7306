"""Is greedy decoding faster than transformers', alone and in a batch?

python -m benchmarks.decode [--rounds=7] [--python=OTHER_PYTHON]
"""

from benchmarks import contest

if __name__ == '__main__':
  contest.main('decode', [('decode', n, n * contest.NEW) for n in (1, 8)])
