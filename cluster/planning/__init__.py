"""What a step costs, and what follows from it: cost models, the emulator on its virtual clock, the placement search."""
