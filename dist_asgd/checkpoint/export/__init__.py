"""Writers of weights to files that other programs read: torch.save, safetensors, Hugging Face directories."""
