"""`python -m spade_t5.launch`, which torchrun and `accelerate launch` start on every rank."""

import sys

from spade_t5.launch.cli import main

sys.exit(main())
