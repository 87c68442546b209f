"""One step of the torch face: built once, replayed while it holds."""
