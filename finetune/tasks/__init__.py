"""The task adapters, one file for each family of data sets; `finetune/registry.py` lists them by name."""
