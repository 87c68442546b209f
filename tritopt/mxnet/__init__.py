"""MXNet's face: optimizers with the API of `mxnet.optimizer` 2.0."""
