"""Tests that run the kernels under Triton's interpreter, without a GPU."""
