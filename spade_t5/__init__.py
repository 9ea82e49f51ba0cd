"""SPADE-T5: encoder-decoder pretraining and fine-tuning for long inputs."""
