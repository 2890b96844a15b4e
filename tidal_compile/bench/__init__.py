"""Benchmarks: `tidal-compile bench decode | kernels | figures`.

`timing` measures times and rates, `decode` runs whole decode steps beside their baselines, `kernels` the ops beside
theirs. `figures` draws the figures of the TidalDecode paper, and `tables` turns results into text. All outputs are
checked before they are timed.
"""
