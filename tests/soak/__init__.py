"""Everything a node does, again and again for hours; at quiet moments memory, threads and
descriptors are looked at, and at all times the books. ``make soak``.

It stands with the tests, as ``tests/chaos`` does: it shows nobody how to use the package.
"""
