"""All of Ray Train."""
