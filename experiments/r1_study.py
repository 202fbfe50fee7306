from deepseek_jax.cli.r1_study import __doc__, run  # noqa: F401

if __name__ == '__main__':
  run()
