"""MXNet's face: the API of `mxnet.optimizer` 2.0."""
