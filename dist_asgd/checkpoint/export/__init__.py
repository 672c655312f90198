"""Weights as files for others: torch.save, safetensors, Hugging Face directories."""
