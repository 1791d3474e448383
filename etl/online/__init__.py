"""Online experiments."""
