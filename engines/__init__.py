"""What samples responses: vLLM, or a plain loop in PyTorch."""
