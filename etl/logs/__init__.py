"""Logs of any format, opened, mapped and cast."""
