"""What the system and the notebook give: processes, memory, hosts, interrupts."""
