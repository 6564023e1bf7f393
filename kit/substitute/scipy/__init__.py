"""The few functions of scipy that pinfer calls, by numpy and the standard library, for machines that lack scipy.

They give the same numbers, slower, but for ``optimize.milp``, which has no solver behind it. gpu.sh puts this folder on
Python's path only where scipy cannot be imported, and says so with its results.
"""
