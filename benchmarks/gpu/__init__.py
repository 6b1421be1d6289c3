"""The kernels on a real GPU, built, checked and timed: `python -m benchmarks.gpu`, which is `__main__.py`."""
