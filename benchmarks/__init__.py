"""Benchmarks of metakern. Times are compared within one run, memory with the idle process; results are JSON."""
