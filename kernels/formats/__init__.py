"""How a value is stored: `weights` and `states`. Kernels and their PyTorch twins."""
