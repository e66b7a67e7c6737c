"""Data that a rank and its parent exchange. Both processes import it; it imports no torch."""
