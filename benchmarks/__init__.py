"""Benchmarks of metakern: times as ratios within one run, memory over the idle process, results as JSON."""
