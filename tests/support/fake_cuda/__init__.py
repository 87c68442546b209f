"""A GPU for the host's half of a step: what is queued on its streams runs later, and on the CPU."""
