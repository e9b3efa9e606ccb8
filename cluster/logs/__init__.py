"""What processes log, and how it is written."""
