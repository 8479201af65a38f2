"""The system: sockets and descriptors, who waits for them, dialling, memory of bodies."""
