"""Integrations of the kernels into libraries that choose their attention themselves.

Each is a package of its own, and imports the library only when it is imported itself.
"""
