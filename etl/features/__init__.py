"""What becomes a model column."""
