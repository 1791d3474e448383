"""The jobs: one file a command, each runnable as it stands; `usr-ray` (jobs/__main__.py) runs them all."""
