"""The command line and multi-process start-up: the only reader of arguments and of the environment."""
