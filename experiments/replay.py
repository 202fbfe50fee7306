from deepseek_jax.cli.replay import __doc__, run  # noqa: F401

if __name__ == '__main__':
  run()
