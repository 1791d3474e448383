"""Whole users in numpy and Arrow: attribution, labels, histories; no pyspark."""
