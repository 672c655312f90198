"""Reads and writes files on local disks and remote stores; storage/registry.py says how to add a store."""
