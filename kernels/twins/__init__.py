"""PyTorch twins that have the names of their kernels: `twins.ops.sqrt` is `ops.sqrt` for a reference."""
