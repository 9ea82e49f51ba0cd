"""Calls of each op that between them launch every kernel variant a GPU user meets; see `compile_kernels`."""
