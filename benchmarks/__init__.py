"""Benchmarks of triton_thresh, and reports on its compiled kernels."""
