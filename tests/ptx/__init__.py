"""Compiled kernels, executed: an interpreter of PTX behind a Triton driver, and the tests that run on it."""
