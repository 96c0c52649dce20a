"""Stands for a foreign regular package named `kernels`."""
