"""Export and scoring."""
