"""`python -m spade_t5.launch`, which torchrun and `accelerate launch` start on every rank."""

import sys

from spade_t5.launch.cli import main
from spade_t5.training import distributed

code = main()
if distributed.launched_world_size() > 1:
    distributed.end_process(code)
sys.exit(code)
