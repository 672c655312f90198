"""Updates parameters in one pass over memory, on CPU and GPU, and chooses between that and PyTorch's operators."""
