"""Measurements that developers of fa4_ext make beside those of `python -m fa4_ext bench`.

Each is a command of its own: `python -m benchmarks.startup`, `.memory`, `.uncovered` and
`.default_choice`, with `--help`. `python -m benchmarks.renew` renews all results. What the planner
follows is measured by tuning/.
"""
