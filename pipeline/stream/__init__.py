"""Streams: two long-lived connections in each direction, for what is small and frequent."""
