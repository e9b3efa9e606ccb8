"""What `tandem` does, a file for each command; cluster/cli.py says which words and flags lead here."""
