"""This folder holds the measurements of `python -m fa4_ext bench`. Nothing else of the package
imports it."""
