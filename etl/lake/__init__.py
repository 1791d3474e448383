"""The Delta tables, their checks and their care."""
