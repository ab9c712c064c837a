"""Measures programs that people run, whole models with random weights, with fa4_ext and without."""
