"""Buckets: parameters of one param group that are updated together, and the averaging of their gradients."""
