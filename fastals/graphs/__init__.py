"""Captured steps: the function that :meth:`fastals.ALS.graphed` returns, its programs, and CUDA graphs."""
