"""Fakes, servers and builders shared by the tests."""

# An event that is expected: long enough for a busy machine, reached only when a test fails.
LONG_TIMEOUT = 30.0

# An event that must not happen: how long a test watches for it.
SHORT_TIMEOUT = 0.05
