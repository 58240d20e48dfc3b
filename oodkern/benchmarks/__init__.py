"""Benchmarks of the kernels against what a user would write or install instead.

`case` says what is compared, `measure` times all contenders of a case in turns, and takes memory and errors beside
them; `rooms` has the cases. `oodkern bench` runs a short subset; a checkout's folder `benches` runs all.
"""
