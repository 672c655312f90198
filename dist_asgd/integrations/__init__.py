"""Averages and sharded checkpoints in training frameworks: one module each, which imports its framework.

A module is imported by its user only, so none of the frameworks is a dependency of this package.
"""
