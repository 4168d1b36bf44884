"""The ops against what they replace and against their best peers.

`pytest benchmarks/` times shapes for two cores on a CPU and the 7B shapes on a GPU, as many as nine minutes take, or
with --quick the smallest. `make bench-gpu` measures every case on a GPU into benchmarks/results/, resuming where it
stopped, and `make bench-record` on any machine. From these files `python -m benchmarks.report` writes
docs/performance.md, its charts and the README's numbers, `python -m benchmarks.dispatch` what "auto" goes by, and
`python -m benchmarks.rates` what a plan of a training run predicts from. `python -m benchmarks.check` tells whether a
ratio has fallen since it was recorded; `python -m benchmarks.tune OP` looks for better tiles.
"""
