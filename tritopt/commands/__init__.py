"""The commands of the command line: their options, and how they print; tritopt.tools does the work."""
