"""Measurements that developers of fa4_ext make beside those of `python -m fa4_ext bench`, each a
command of its own.

`python -m benchmarks.startup`, `.memory`, `.rules`, `.fit_speed_rules`, `.tune`, `.fit_tile_rules`
and `.uncovered`, with `--help`.
"""
