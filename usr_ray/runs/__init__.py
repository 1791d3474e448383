"""The one place that knows the names and JSON of a run directory."""
