"""On a GPU: a snapshot goes to pinned memory in parts, while the next step is made, and comes back bit for bit."""

from pathlib import Path

import pytest
import torch

from spade_t5.checkpoint import CheckpointSaver, load_checkpoint, snapshot, take_snapshot
from spade_t5.testing.checkpoints import KEEP_ALL, tiny_backend, train

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def test_tensors_larger_than_a_block_of_pinned_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(snapshot, "PINNED_BLOCK_BYTES", 1024)
    trained = tiny_backend(width=37)
    train(trained, [1])
    before = {name: tensor.clone() for name, tensor in trained.module.state_dict().items()}
    taken = take_snapshot(trained, step=1, facts={})
    tensors = [tensor for file in taken.files.values() for tensor in file.values()]
    assert max(len(tensor.parts) for tensor in tensors) > 4
    assert all(part.is_pinned() for tensor in taken.files["rank-00000.safetensors"].values() for part in tensor.parts)
    saver = CheckpointSaver(tmp_path, KEEP_ALL)
    saver.save(taken)
    losses = train(trained, [2, 3])
    report = saver.wait()
    assert report is not None
    resumed = tiny_backend(width=37, seed=1)
    load_checkpoint(report.path, resumed)
    for name, tensor in before.items():
        assert torch.equal(tensor, resumed.module.state_dict()[name]), name
    assert train(resumed, [2, 3]) == losses
