"""Helpers for the operating system and the notebook: processes, memory, hosts, interrupts."""
