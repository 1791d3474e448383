"""Metrics, baselines and statistics; numpy and scipy, no torch."""
