"""The load generator behind `tandem bench`: open-loop load, its targets, and what was measured."""
