"""Build, check and time the kernels on a GPU: `python -m benchmarks.gpu` runs `__main__.py`."""
