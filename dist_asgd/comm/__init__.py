"""Communication between ranks: process groups, the two collectives of a step, Python objects, and agreement."""
