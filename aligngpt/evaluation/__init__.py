"""The benchmarks that AlignGPT is judged on, one file each: official files to questions, answers to a score.

`task.py` says what a benchmark is, `runner.py` answers its questions, `report.py` puts the scores beside the paper's;
`aligngpt eval` is all of that.
"""
