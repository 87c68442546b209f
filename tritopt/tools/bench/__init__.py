"""`tritopt bench`: what a step takes on this GPU, beside the bandwidth of a copy and beside other libraries."""
