"""This folder holds the measurements that the planner follows, and the fitting of its rules to
them.

Each of these commands measures on a GPU and adds to a file in tuning/results the problems that the
file lacks:

python -m tuning.tiles --csv tuning/results/h200_tiles.csv          (a build of KERNELS=tuning)
python -m tuning.stock --peer flash --csv tuning/results/h200_stock.csv
python -m tuning.stock --peer cudnn --csv tuning/results/h200_cudnn.csv
python -m tuning.schedules --csv tuning/results/h200_schedules.csv

Fitting needs no GPU: `python -m tuning.fit_tiles` writes kernels/tile_rules.csv and `python -m
tuning.fit_stock` kernels/speed_rules.csv. The formulas of csrc/core that choose a tile
schedule were fitted by hand; tests/test_schedules.py checks them against the measurements.
"""
