"""Tools that tests and commands use, and no optimizer."""
