"""Studies and searches: many trials on Ray."""
