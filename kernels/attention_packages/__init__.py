"""Attention kernels of other packages, none of which has to be installed: how each is called, and what it takes.

No module here imports such a package before it is called.
"""
