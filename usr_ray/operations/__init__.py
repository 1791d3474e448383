"""The daily run; MLflow."""
