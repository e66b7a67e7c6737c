"""What travels between a rank and its parent. Used by both; imports no torch."""
