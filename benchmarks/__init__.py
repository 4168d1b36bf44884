"""The ops against what they replace and against their best peers.

`pytest benchmarks/` times small shapes on a CPU and the 7B shapes on a GPU. `make bench-gpu` measures every case on a
GPU into benchmarks/results/, resuming where it stopped; `python -m benchmarks.dispatch` then writes what "auto" goes
by, and `python -m benchmarks.tune OP` looks for better tiles.
"""
