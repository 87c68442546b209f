"""Phases run over lists of tensors; no optimizer and neither face is known here."""
