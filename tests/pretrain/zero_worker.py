"""Runs several pretraining runs one after the other in the same processes: `zero_worker.py CONFIG.yaml ...`."""

import sys
from pathlib import Path

from spade_t5.config import from_mapping, read_yaml
from spade_t5.pretrain.run import PretrainConfig, pretrain
from spade_t5.training import distributed

if __name__ == "__main__":
    for path in sys.argv[1:]:
        pretrain(from_mapping(PretrainConfig, read_yaml(Path(path))))
    distributed.shutdown()
    distributed.end_process(0)
