"""`tritopt bench`: time of a step on this GPU, beside the bandwidth of a copy and beside other libraries."""
