"""Benchmarks: `tidal-compile bench decode | kernels | figures`.

`timing` measures, `decode` runs whole decode steps beside their baselines, `kernels` the ops beside theirs, `figures`
draws what the TidalDecode paper does, `tables` turns results into text. All outputs are checked before they are timed.
"""
