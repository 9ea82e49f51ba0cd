"""`python -m spade_t5.launch`, which launchers start on every rank."""

from spade_t5.launch.cli import run_process

run_process()
