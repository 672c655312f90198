"""Buckets: parameters of one group that are updated together, plain (flat) or placed by somebody else (DTensors)."""
