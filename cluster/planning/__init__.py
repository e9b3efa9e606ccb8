"""Runs the production code in virtual time: the clock, and (later) the emulator and the placement search."""
