"""What each command of the command line takes and prints; other modules do the work."""
