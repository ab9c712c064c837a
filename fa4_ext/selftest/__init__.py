"""This folder holds `python -m fa4_ext selftest`, which runs every compiled kernel by itself.
Nothing else of the package imports it."""
