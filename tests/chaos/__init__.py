"""A real etcd and members of ours, killed, stopped and cut off from one another; then every write
that was acknowledged is looked for in all logs. ``make chaos``; the tests run a few seconds of it.

It stands with the tests, for it tests the package and shows nobody how to use it: that is done in
``examples``, whose member and storage it runs.
"""
