"""From logs to the samples table."""
