"""What `spade-t5 doctor` looks at: every node before a run, side by side.

Each node gathers facts about itself (`software`, `machine`, `storage`, `data`), a few are measured between nodes (`sharing`, `clocks`, `network`),
and a pure function (`checks`) compares what came together and says what is wrong. A fact that cannot be had is reported as such and keeps no other
from being gathered.
"""
