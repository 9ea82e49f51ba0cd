"""`python -m spade_t5.launch`, which launchers start on every rank."""

import sys

from spade_t5.launch.cli import EXIT_FAULT, EXIT_STOPPED, is_launched, main
from spade_t5.messages import show_fault
from spade_t5.training import distributed

if distributed.launched_world_size() == 1 and not is_launched():
    sys.exit(main())
try:
    code = main()
except Exception:
    show_fault(*sys.exc_info())
    code = EXIT_FAULT
# torchrun takes any other code for a failure and ends the other ranks, which may still be at their last files.
distributed.end_process(0 if is_launched() and code == EXIT_STOPPED else code)
