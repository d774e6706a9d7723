"""Captured steps: what :meth:`fastals.ALS.graphed` returns, its programs, and CUDA graphs."""
