"""The layers of SPADE-T5 in plain PyTorch: they know tensors and `LayersConfig`, nothing of transformers."""
