"""The update in one pass over memory, on CPU and GPU, and the choice between its forms."""
