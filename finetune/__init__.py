"""Fine-tuning and evaluation: task adapters, metrics, and the runs that use them."""
